"""How long prompts and answers are: laws fitted to real traces, or a trace's own lengths."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

LEVELS = (0, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95, 0.99, 1)  # of the quantiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLaw:
    """Quantiles of tokens in prompts and in answers, at `LEVELS`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


LAWS = {
    # The first human turn and the first reply of 1,024 ShareGPT conversations, counted with
    # SmolLM2's tokenizer (the sample of OpenPPL/ppl.llm.serving, tools/samples_1024.json).
    # Input: mean 106, median 28, 99 % below 840. Output: mean 295, median 264, 99 % below 888.
    "sharegpt": LengthLaw(
        inputs=(2, 6, 9, 14, 21, 28, 42, 96, 196, 334, 569, 840, 1051),
        outputs=(5, 22, 39, 119, 210, 264, 316, 404, 514, 632, 754, 888, 952),
    ),
    # Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_conv.csv (CC-BY-4.0, Splitwise,
    # ISCA 2024), all 19,366 requests of November 2023. Mean input 1155, output 211.
    "azure-conv": LengthLaw(
        inputs=(2, 181, 207, 396, 703, 1020, 1071, 1189, 1876, 2734, 4083, 4142, 14050),
        outputs=(7, 41, 54, 85, 103, 129, 177, 395, 411, 424, 451, 601, 1000),
    ),
    # The same, AzureLLMInferenceTrace_code.csv, all 8,819. Mean input 2048, output 28.
    "azure-code": LengthLaw(
        inputs=(3, 75, 147, 578, 1075, 1469, 1909, 2744, 3920, 5188, 7303, 7436, 7437),
        outputs=(6, 6, 7, 9, 11, 13, 16, 24, 39, 55, 90, 251, 1899),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLengths:
    """Tokens of one request's prompt and of its answer."""

    input_tokens: int
    output_tokens: int

    def clipped(self, *, max_input: int, max_output: int) -> "RequestLengths":
        """These lengths, or the limits where they are longer."""
        return RequestLengths(
            input_tokens=min(self.input_tokens, max_input),
            output_tokens=min(self.output_tokens, max_output),
        )


def sharegpt_lengths(num_requests: int, *, seed: int) -> list[RequestLengths]:
    """Seeded lengths of ShareGPT's first turns."""
    return law_lengths("sharegpt", num_requests, seed=seed)


def law_lengths(name: str, num_requests: int, *, seed: int) -> list[RequestLengths]:
    """Seeded lengths of one of `LAWS`, input and output drawn independently.

    Each draw falls into its own equal share of the law, so that a short list has the law's mean
    and tail too.
    """
    rng, law = np.random.default_rng(seed), LAWS[name]
    return [
        RequestLengths(input_tokens=int(inputs), output_tokens=int(outputs))
        for inputs, outputs in zip(
            _draw(law.inputs, num_requests, rng),
            _draw(law.outputs, num_requests, rng),
            strict=True,
        )
    ]


def trace_lengths(path: str | os.PathLike, num_requests: int) -> list[RequestLengths]:
    """The first `num_requests` of a trace, as `read_trace` reads it."""
    lengths = read_trace(path)
    if len(lengths) < num_requests:
        raise ValueError(f"{path} has {len(lengths)} requests, {num_requests} were asked for")
    return lengths[:num_requests]


def clipped_lengths(
    trace: str | None, num_requests: int, *, seed: int, max_input: int, max_output: int
) -> list[RequestLengths]:
    """The first lengths of a trace, or else of ShareGPT's law, none beyond the limits."""
    lengths = (
        trace_lengths(trace, num_requests) if trace else sharegpt_lengths(num_requests, seed=seed)
    )
    return [pair.clipped(max_input=max_input, max_output=max_output) for pair in lengths]


def read_trace(path: str | os.PathLike) -> list[RequestLengths]:
    """Every request of a CSV file with `input_tokens` and `output_tokens`, or of a Mooncake trace.

    Mooncake's traces are JSON lines with `input_length` and `output_length`. Lines with an empty
    prompt or an empty answer are passed over; a trace of such lines alone is refused.
    """
    pairs = _read_jsonl(path) if is_mooncake(path) else _read_csv(path)
    lengths = [
        RequestLengths(input_tokens=inputs, output_tokens=outputs)
        for inputs, outputs in pairs
        if min(inputs, outputs) > 0
    ]
    if not lengths:
        raise ValueError(
            f"{path} needs a request with a prompt and an answer; got {len(pairs)} requests, none "
            "of which has both"
        )
    return lengths


def is_mooncake(path: str | os.PathLike) -> bool:
    """Whether a trace is Mooncake's, by its name."""
    return pathlib.Path(path).suffix == ".jsonl"


def read_mooncake(
    path: str | os.PathLike, names: Sequence[str], num_lines: int | None = None
) -> list[dict]:
    """The first lines of a Mooncake trace, or all; each has a value for every one of `names`."""
    entries = []
    with pathlib.Path(path).open() as file:
        for number, line in enumerate(itertools.islice(file, num_lines), 1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                entry = None
            if not isinstance(entry, dict) or not set(names) <= set(entry):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with {', '.join(names)}; "
                    f"got {line.strip()[:100]!r}"
                )
            entries.append(entry)
    return entries


def random_prompts(
    lengths: Sequence[RequestLengths], *, vocab_size: int, seed: int
) -> list[list[int]]:
    """Seeded random token ids of the wanted lengths: speed does not depend on the text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, pair.input_tokens).tolist() for pair in lengths]


def _read_csv(path: str | os.PathLike) -> list[tuple[int, int]]:
    with pathlib.Path(path).open(newline="") as file:
        lines = csv.DictReader(file)
        if not {"input_tokens", "output_tokens"} <= set(lines.fieldnames or ()):
            raise ValueError(
                f"{path} needs the columns input_tokens and output_tokens, named in its first "
                f"line; got {lines.fieldnames}"
            )
        return [(int(line["input_tokens"]), int(line["output_tokens"])) for line in lines]


def _read_jsonl(path: str | os.PathLike) -> list[tuple[int, int]]:
    entries = read_mooncake(path, ["input_length", "output_length"])
    return [(entry["input_length"], entry["output_length"]) for entry in entries]


def _draw(quantiles: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of the law that passes through `quantiles`, straight between their logarithms."""
    levels = (rng.permutation(count) + rng.random(count)) / count
    return np.round(np.exp(np.interp(levels, LEVELS, np.log(quantiles)))).astype(int)
