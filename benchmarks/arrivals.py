"""When requests arrive and how long they are: a trace's own, or laws fitted to one."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.lengths import (
    LAWS,
    LEVELS,
    RequestLengths,
    is_mooncake,
    law_lengths,
    random_prompts,
    read_mooncake,
    trace_lengths,
)

DEFAULT_LAW = "azure-conv"
# Milliseconds between two arrivals of the same trace, at `LEVELS`: its 19,365 gaps. Mean 181,
# standard deviation 1.09 times the mean: a little more uneven than chance (1.0). The longest is
# 4315, but there is one of those: the last hundredth ends where mean and deviation are the trace's.
GAPS_MS = (0.5, 6, 16, 48, 87, 119, 159, 247, 346, 421, 565, 891, 1700)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request, and when it is sent, in seconds since the first."""

    seconds: float
    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in order of arrival, at a mean rate of one a second."""

    times: list[float]
    lengths: list[RequestLengths]

    def at_rate(self, rate: float, prompts: Sequence[list[int]]) -> list[Arrival]:
        """The same arrivals on a clock that makes them `rate` a second on average."""
        return [
            Arrival(seconds=time / rate, prompt=prompt, max_tokens=pair.output_tokens)
            for time, pair, prompt in zip(self.times, self.lengths, prompts, strict=True)
        ]


def read_arrivals(path: str | os.PathLike, num_requests: int, *, first: int = 0) -> Trace:
    """Requests `first` and after of a CSV file with `arrival_s`, or of a Mooncake trace.

    Lines with an empty prompt or an empty answer are passed over.
    """
    lines = _read_jsonl(path) if is_mooncake(path) else _read_csv(path)
    lines = sorted(line for line in lines if min(line[1:]) > 0)
    chosen = lines[first : first + num_requests]
    if len(chosen) < num_requests:
        raise ValueError(
            f"{path} has {len(lines)} requests, {num_requests} from number {first} on were asked "
            "for"
        )
    return Trace(
        times=_at_rate_one([line[0] for line in chosen]),
        lengths=[RequestLengths(input_tokens=i, output_tokens=o) for _, i, o in chosen],
    )


def drawn_arrivals(num_requests: int, *, seed: int) -> Trace:
    """Seeded arrivals and lengths after the Azure conversation trace, independent of each other."""
    rng = np.random.default_rng(seed)
    count = num_requests - 1
    levels = (rng.permutation(count) + rng.random(count)) / max(1, count)
    gaps = np.exp(np.interp(levels, LEVELS, np.log(GAPS_MS)))
    return Trace(
        times=_at_rate_one([0.0, *np.cumsum(gaps).tolist()]),
        lengths=law_lengths(DEFAULT_LAW, num_requests, seed=seed),
    )


def replaced_lengths(trace: Trace, source: str, *, seed: int) -> Trace:
    """The arrivals of `trace` with the lengths of a law, by its name, or of another trace."""
    count = len(trace.times)
    is_law = source in LAWS
    lengths = law_lengths(source, count, seed=seed) if is_law else trace_lengths(source, count)
    return dataclasses.replace(trace, lengths=lengths)


def scaled_lengths(trace: Trace, scale: float, *, max_input: int, max_output: int) -> Trace:
    """The trace with its lengths times `scale`, at least a token, and then clipped."""
    lengths = [
        RequestLengths(
            input_tokens=max(1, round(pair.input_tokens * scale)),
            output_tokens=max(1, round(pair.output_tokens * scale)),
        ).clipped(max_input=max_input, max_output=max_output)
        for pair in trace.lengths
    ]
    return dataclasses.replace(trace, lengths=lengths)


def prompts_of(trace: Trace, *, vocab_size: int, num_shared: int, seed: int) -> list[list[int]]:
    """Seeded random prompts that all begin with the same `num_shared` tokens, or all of them."""
    start = RequestLengths(input_tokens=max(1, num_shared), output_tokens=1)
    (shared,) = random_prompts([start], vocab_size=vocab_size, seed=seed + 1)
    prompts = random_prompts(trace.lengths, vocab_size=vocab_size, seed=seed)
    return [
        (shared[:num_shared] + prompt[num_shared:])[: len(prompt)] if num_shared else prompt
        for prompt in prompts
    ]


def _at_rate_one(times: list[float]) -> list[float]:
    """Seconds since the first, scaled so that the mean gap is a second."""
    if len(times) < 2 or times[-1] <= times[0]:
        raise ValueError(
            f"a rate needs two requests that arrive one after the other, got {len(times)} within "
            f"{times[-1] - times[0] if times else 0} seconds"
        )
    mean_gap = (times[-1] - times[0]) / (len(times) - 1)
    return [(time - times[0]) / mean_gap for time in times]


def _read_csv(path: str | os.PathLike) -> list[tuple[float, int, int]]:
    names = ("arrival_s", "input_tokens", "output_tokens")
    with pathlib.Path(path).open(newline="") as file:
        lines = csv.DictReader(file)
        if not set(names) <= set(lines.fieldnames or ()):
            raise ValueError(
                f"{path} needs the columns {', '.join(names)}, named in its first line; got "
                f"{lines.fieldnames}"
            )
        return [
            (float(line["arrival_s"]), int(line["input_tokens"]), int(line["output_tokens"]))
            for line in lines
        ]


def _read_jsonl(path: str | os.PathLike) -> list[tuple[float, int, int]]:
    entries = read_mooncake(path, ["timestamp", "input_length", "output_length"])
    return [
        (entry["timestamp"] / 1e3, entry["input_length"], entry["output_length"])
        for entry in entries
    ]
