"""How long prompts and answers are: laws fitted to ShareGPT, or a trace's own lengths."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

# Quantiles of the first human turn and the first reply of 1,024 ShareGPT conversations, counted
# with SmolLM2's tokenizer (the sample of OpenPPL/ppl.llm.serving, tools/samples_1024.json).
# Input: mean 106, median 28, 99 % below 840. Output: mean 295, median 264, 99 % below 888.
SHAREGPT_LEVELS = (0, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95, 0.99, 1)
SHAREGPT_INPUT = (2, 6, 9, 14, 21, 28, 42, 96, 196, 334, 569, 840, 1051)
SHAREGPT_OUTPUT = (5, 22, 39, 119, 210, 264, 316, 404, 514, 632, 754, 888, 952)


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
    """Seeded lengths of ShareGPT's first turns, input and output drawn independently.

    Each draw falls into its own equal share of the law, so that a short list has the law's mean
    and tail too.
    """
    rng = np.random.default_rng(seed)
    return [
        RequestLengths(input_tokens=int(inputs), output_tokens=int(outputs))
        for inputs, outputs in zip(
            _draw(SHAREGPT_INPUT, num_requests, rng),
            _draw(SHAREGPT_OUTPUT, num_requests, rng),
            strict=True,
        )
    ]


def trace_lengths(path: str | os.PathLike, num_requests: int) -> list[RequestLengths]:
    """The first `num_requests` of a CSV file with columns `input_tokens` and `output_tokens`.

    Lines with an empty prompt or an empty answer are passed over.
    """
    lengths = []
    with pathlib.Path(path).open(newline="") as file:
        lines = csv.DictReader(file)
        if not {"input_tokens", "output_tokens"} <= set(lines.fieldnames or ()):
            raise ValueError(
                f"{path} needs the columns input_tokens and output_tokens, named in its first "
                f"line; got {lines.fieldnames}"
            )
        for line in lines:
            pair = RequestLengths(
                input_tokens=int(line["input_tokens"]), output_tokens=int(line["output_tokens"])
            )
            if min(pair.input_tokens, pair.output_tokens) > 0:
                lengths.append(pair)
            if len(lengths) == num_requests:
                return lengths
    raise ValueError(f"{path} has {len(lengths)} requests, {num_requests} were asked for")


def random_prompts(
    lengths: Sequence[RequestLengths], *, vocab_size: int, seed: int
) -> list[list[int]]:
    """Seeded random token ids of the wanted lengths: speed does not depend on the text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, pair.input_tokens).tolist() for pair in lengths]


def _draw(quantiles: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of the law that passes through `quantiles`, straight between their logarithms."""
    levels = (rng.permutation(count) + rng.random(count)) / count
    return np.round(np.exp(np.interp(levels, SHAREGPT_LEVELS, np.log(quantiles)))).astype(int)
