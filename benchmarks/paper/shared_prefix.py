"""Figure 16: normalised latency where all prompts begin with the same examples.

The paper translates WMT16 from English into German behind one example, 80 tokens, and behind five,
341 tokens, beside Orca (Oracle). Neither the texts nor Orca are here: sentences and translations
are as long as such sentences are, drawn evenly, and what the prefix cache buys is seen beside the
same engine without it.
"""

import argparse

import numpy as np

from benchmarks.arrivals import Trace, drawn_arrivals, prompts_of
from benchmarks.lengths import RequestLengths
from benchmarks.paper.figure import Axis, Figure, Made, Workload, engine_line
from benchmarks.paper.prefix_cache import cache_engines

SHORTEST = 8  # of sentences and of translations; options say which are the longest


def make(options: argparse.Namespace) -> Made:
    """A panel for each prefix: with the prefix cache, and without."""
    engines = cache_engines(options)
    llms = list(engines.values())
    vocab_size = llms[0].model_config.vocab_size
    workloads = [
        _workload(options, num_shared, vocab_size=vocab_size) for num_shared in options.prefixes
    ]
    lines = [
        engine_line(name, llm, workload) for workload in workloads for name, llm in engines.items()
    ]
    return Made(lines=lines, llms=llms, model_source=llms[0].model_source)


def _workload(options: argparse.Namespace, num_shared: int, *, vocab_size: int) -> Workload:
    """The same sentences at the same times, whatever stands before them."""
    rng = np.random.default_rng(options.seed)
    sentences, answers = (
        rng.integers(min(SHORTEST, most), most, options.requests, endpoint=True).tolist()
        for most in (options.max_input, options.max_output)
    )
    trace = Trace(
        times=drawn_arrivals(options.requests, seed=options.seed).times,
        lengths=[
            RequestLengths(input_tokens=num_shared + sentence, output_tokens=answer)
            for sentence, answer in zip(sentences, answers, strict=True)
        ],
    )
    return Workload(
        panel=f"prefix of {num_shared} tokens",
        trace=trace,
        prompts=prompts_of(trace, vocab_size=vocab_size, num_shared=num_shared, seed=options.seed),
    )


def _longest(options: argparse.Namespace) -> int:
    return max(options.prefixes) + options.max_input + options.max_output


FIGURE = Figure(
    of_paper="16",
    title="a shared prefix",
    axis=Axis.REQUEST_RATE,
    defaults={
        "requests": 16,
        "rates": [1.0, 2.0, 4.0],
        "repeats": 3,
        "rows": 4,
        "reserved": 512,
        "block_size": 16,
        "prefixes": [80, 341],
        "max_input": 48,  # of a sentence, behind the prefix
        "max_output": 48,
    },
    longest=_longest,
    make=make,
)
