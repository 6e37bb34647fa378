"""Figure 12: normalised latency of basic sampling, beside contiguous reservation.

The paper has two traces and three sizes of OPT; here is one model, and ShareGPT's lengths (there is
no trace of Alpaca's; --lengths takes others). Its FasterTransformer is `unpaged`, a static batch
whose rows reserve the longest length; its Orca (Max) is `unpaged-refilled`, whose rows are given to
the next request one by one. Orca (Pow2) and Orca (Oracle) reserve as much as each request will
need, in slabs of different lengths, which our baseline does not have: nearest is `unpaged-tight`,
all of whose rows reserve what the longest request needs.
"""

import argparse

from benchmarks.paper.figure import Axis, Figure, Line, Made
from benchmarks.paper.workload import LENGTHS, RESERVED, basic_workload, longest
from benchmarks.serving_sides import PAGED, make_sides


def make(options: argparse.Namespace) -> Made:
    """One panel: the engine and the baselines that were asked for."""
    made = make_sides(options)
    workload = basic_workload(options, vocab_size=made.vocab_size)
    lines = [
        Line(workload=workload, side=side, llm=made.llm if side.name == PAGED else None)
        for side in made.sides
    ]
    return Made(lines=lines, llms=[made.llm], model_source=made.model_source)


FIGURE = Figure(
    of_paper="12",
    title="basic sampling, beside contiguous reservation",
    axis=Axis.REQUEST_RATE,
    defaults={
        **LENGTHS,
        "requests": 16,
        "rates": [0.5, 1.0, 2.0],
        "repeats": 3,
        "rows": 4,
        "reserved": RESERVED,
        "block_size": 16,
        "unpaged": ["unpaged", "unpaged-refilled"],
    },
    longest=longest,
    make=make,
)
