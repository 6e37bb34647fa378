"""Requests that several figures share, and their lengths."""

import argparse

from benchmarks.arrivals import drawn_arrivals, prompts_of, replaced_lengths, scaled_lengths
from benchmarks.paper.figure import Workload

# ShareGPT's answers are of 295 tokens on average, and two cores generate about a hundred in a
# second: with its own lengths a figure would take an hour. What a baseline's row reserves is scaled
# with them: the paper's models, and so its rows, have 2048 tokens.
LENGTHS = {"lengths": "sharegpt", "length_scale": 0.125, "max_input": 128, "max_output": 128}
RESERVED = 256


def basic_workload(options: argparse.Namespace, *, vocab_size: int) -> Workload:
    """The requests of basic sampling: lengths of ShareGPT, scaled and clipped.

    The paper's arrivals are Poisson's; these gaps are the Azure trace's law, whose deviation is
    1.09 times the mean where Poisson's is 1.
    """
    trace = drawn_arrivals(options.requests, seed=options.seed)
    trace = scaled_lengths(
        replaced_lengths(trace, options.lengths, seed=options.seed),
        options.length_scale,
        max_input=options.max_input,
        max_output=options.max_output,
    )
    return Workload(
        panel=f"lengths of {options.lengths}, times {options.length_scale:g}",
        trace=trace,
        prompts=prompts_of(trace, vocab_size=vocab_size, num_shared=0, seed=options.seed),
    )


def longest(options: argparse.Namespace) -> int:
    """Tokens of the longest prompt and the longest answer together."""
    return options.max_input + options.max_output
