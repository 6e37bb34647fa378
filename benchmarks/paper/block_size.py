"""Figure 18b: latency of basic sampling with blocks of different sizes, in the same bytes.

The paper has sizes from 1 to 256; this engine's are powers of two from 8 to 128, which its kernels
copy whole. Of its two traces, ShareGPT's lengths are here; --lengths takes others. Figure 18a, the
kernel alone, is `python -m benchmarks.step`.
"""

import argparse

from benchmarks.paper.figure import Axis, Figure, Made, engine_line
from benchmarks.paper.workload import LENGTHS, RESERVED, basic_workload, longest
from benchmarks.serving_sides import PAGED, make_engine


def make(options: argparse.Namespace) -> Made:
    """One panel: an engine for each block size."""
    llms = [
        make_engine(options, block_size=block_size, enable_prefix_caching=False)
        for block_size in options.block_sizes
    ]
    workload = basic_workload(options, vocab_size=llms[0].model_config.vocab_size)
    lines = [engine_line(PAGED, llm, workload) for llm in llms]
    return Made(lines=lines, llms=llms, model_source=llms[0].model_source)


FIGURE = Figure(
    of_paper="18b",
    title="block sizes",
    axis=Axis.BLOCK_SIZE,
    defaults={
        **LENGTHS,
        "requests": 16,
        "rates": [2.0],
        "repeats": 3,
        "rows": 4,
        "reserved": RESERVED,
        "block_sizes": [8, 16, 32, 64, 128],
    },
    longest=longest,
    make=make,
)
