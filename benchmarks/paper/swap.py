"""Figure 19b: preempted sequences swapped to host memory, or computed again, by block size.

The prefix cache is off, as the paper has none: with it a sequence that is computed again finds the
blocks that nobody took meanwhile (`python -m benchmarks.savings` compares that). The load comes
nearly at once, and the pool is too small for it; the table counts preemptions. Blocks of 64 and
more hold these short answers in one or two, so that hardly any is preempted. On a CPU the host's
memory is the pool's too, and a swap a copy within it: the paper's PCIe is not seen there. Figure
19a times transfers and recomputation alone; the engine does neither without a step, so it is not
re-made.
"""

import argparse

from benchmarks.paper.figure import Axis, Figure, Made, engine_line
from benchmarks.paper.workload import LENGTHS, RESERVED, basic_workload, longest
from benchmarks.serving_sides import make_engine

RECOMPUTING, SWAPPING = "recomputing", "swapping"


def make(options: argparse.Namespace) -> Made:
    """One panel: two engines for each block size."""
    spaces = {RECOMPUTING: 0.0, SWAPPING: options.swap_space}
    engines = [
        (
            name,
            make_engine(
                options, block_size=block_size, enable_prefix_caching=False, swap_space=swap_space
            ),
        )
        for block_size in options.block_sizes
        for name, swap_space in spaces.items()
    ]
    llms = [llm for _, llm in engines]
    workload = basic_workload(options, vocab_size=llms[0].model_config.vocab_size)
    lines = [engine_line(name, llm, workload) for name, llm in engines]
    return Made(lines=lines, llms=llms, model_source=llms[0].model_source)


FIGURE = Figure(
    of_paper="19b",
    title="swapping and recomputing",
    axis=Axis.BLOCK_SIZE,
    defaults={
        **LENGTHS,
        "length_scale": 0.25,  # answers that are long enough to outgrow the pool
        "requests": 12,
        "rates": [16.0],
        "repeats": 3,
        "rows": 1,
        "reserved": RESERVED,
        "block_sizes": [8, 16, 32],
        "swap_space": 1.0,
    },
    longest=longest,
    make=make,
)
