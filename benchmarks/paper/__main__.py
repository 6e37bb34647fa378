"""Figures of the vLLM paper, measured on this machine with this engine.

python -m benchmarks.paper FIGURE... [--plot FILE.png]

  latency        figure 12: normalised latency against request rate, beside contiguous reservation
  shared-prefix  figure 16: the same behind a prefix that all prompts share
  chat           figure 17: the same with conversations of several rounds
  block-size     figure 18b: the same workload with blocks of different sizes
  swap           figure 19b: preempted sequences swapped, or computed again

The paper is "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(Kwon et al., SOSP 2023, arXiv 2309.06180). Normalised latency is the mean, over the requests of a
run, of E2EL divided by the tokens of the answer. As in benchmarks.serving_sim, requests come in
open loop, prompts are random tokens, lengths of answers are forced, decoding is greedy, and all
sides of a figure hold the same bytes of keys and values: --rows times --reserved tokens. Its models
of 13 to 175 billion parameters, its GPUs and its hours of trace are not here, and lengths are
scaled, so that shapes can be compared, and seconds cannot. Its sharing in parallel sampling and
beam search, figures 14 and 15, is in benchmarks.memory and benchmarks.savings.
"""

import argparse
import json

from benchmarks.measure import CompileLog, provenance
from benchmarks.paper.figure import Figure
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.options import parse_options
from benchmarks.paper.plot import draw
from benchmarks.paper.points import measure, warm_up
from benchmarks.paper.table import print_table


def main() -> None:
    """Prints a table for people and, last, one JSON line, for each figure."""
    each = parse_options(__doc__, FIGURES)
    compiles = CompileLog()
    reports = []
    for name, options in each.items():
        reports.append(_run(name, FIGURES[name], options, compiles))
        print_table(reports[-1])
        # Before the next figure and the picture, which may fail: the points took minutes.
        print(json.dumps({**reports[-1], **provenance()}), flush=True)
    plot = next(iter(each.values())).plot
    if plot:
        draw(reports, plot)


def _run(name: str, figure: Figure, options: argparse.Namespace, compiles: CompileLog) -> dict:
    made = figure.make(options)
    try:
        warm_up(made.lines)
        compiles.events.clear()
        points = measure(made.lines, options)
    finally:  # the next figure needs the memory
        for llm in made.llms:
            llm.close()
    used = {key: getattr(options, key) for key in figure.defaults}
    return {
        "benchmark": "paper",
        "figure": name,
        "of_paper": figure.of_paper,
        "title": figure.title,
        "axis": figure.axis.value,
        "dtype": options.dtype,
        "seed": options.seed,
        **used,
        "points": points,
        "compiles_after_warm_up": len(compiles.events),
        "model": made.model_source,
    }


if __name__ == "__main__":
    main()
