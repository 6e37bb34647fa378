"""The tables of figures in the README and the documentation, made from the newest result files.

python -m benchmarks.tabulate [--write] [--plots FOLDER]

A page names a table where it wants one, `<!-- figures: NAME -->`, and a test compares what stands
there with what this makes. So is every figure that a sentence quotes (tests/docs/test_quotes.py).
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks import figures, gpu_figures, plot_compare, plot_latency, plot_serving
from benchmarks.plot import has_matplotlib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(ROOT / page for page in ("README.md", "docs/benchmarks.md", "docs/when.md"))
PLACE = re.compile(r"<!-- figures: (.+) -->\n(?:.*\n)*?<!-- end of figures -->\n")
PLOTS = {
    "compare": plot_compare.draw,
    "latency": plot_latency.draw,
    "serving_sim": plot_serving.draw,
}


class Results(NamedTuple):
    """The result files that count."""

    cpu: figures.Reports
    beside_vllm: figures.Reports  # runs beside it alone
    h100: list[dict]  # of `gpu_check`, oldest first


TABLES: dict[str, Callable[[Results], str]] = {
    "paged": lambda results: figures.paged(results.cpu),
    "speedups": lambda results: figures.speedups(results.cpu),
    "memory": lambda results: figures.memory(results.cpu),
    "savings": lambda results: figures.savings(results.cpu),
    "engines": lambda results: figures.engines(results.cpu),
    "beside vllm": lambda results: figures.engines(results.beside_vllm),
    "attention h100": lambda results: gpu_figures.attention(results.h100),
}


def main() -> None:
    """Prints the tables, or writes them into the pages; and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tabulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="into the pages, between their marks")
    parser.add_argument("--plots", type=pathlib.Path, help="a folder for a PNG of each result")
    options = parser.parse_args()
    if options.plots and not (options.plots.is_dir() and has_matplotlib()):
        parser.error("--plots needs a folder that exists, and matplotlib; install jpaged[plot]")
    results = newest(RESULTS)
    tables = {name: make(results) for name, make in TABLES.items()}
    if options.write:
        for page in PAGES:
            page.write_text(with_tables(page.read_text(), tables))
    else:
        print("\n".join(f"{name}\n\n{made}" for name, made in tables.items()), end="")
    for (name, dtype), report in results.cpu.items():
        if options.plots and name in PLOTS:
            PLOTS[name](report, str(options.plots / f"{name}-{dtype}.png"))


def newest(folder: pathlib.Path) -> Results:
    """The last report of each benchmark and dtype: names of files begin with dates."""
    cpu: dict[tuple[str, str], dict] = {}
    beside_vllm: dict[tuple[str, str], dict] = {}
    for file in sorted(folder.glob("*-cpu-*.json")):
        report = json.loads(file.read_text())
        key = report["benchmark"], report.get("dtype", "float32")
        if "-compare-vllm-" in file.name:
            beside_vllm[key] = report
        elif report.get("established") is not False:  # else its note says why
            cpu[key] = report
    h100 = [
        json.loads(file.read_text()) for file in sorted(folder.glob("*-nvidia-h100-*hbm3.json"))
    ]
    return Results(cpu, beside_vllm, h100)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The text with the tables between its marks.

    Raises ValueError for a mark that names no table, or is not closed.
    """

    def made(place: re.Match) -> str:
        name = place.group(1)
        if name not in tables:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(tables)}")
        return f"<!-- figures: {name} -->\n{tables[name]}<!-- end of figures -->\n"

    found, count = PLACE.subn(made, text)
    marks = text.count("<!-- figures: "), text.count("<!-- end of figures -->\n")
    if marks != (count, count):
        raise ValueError(
            f"expected marks in pairs, got {marks[0]} that begin and {marks[1]} that end"
        )
    return found


if __name__ == "__main__":
    main()
