"""The README's tables of figures, made from the newest result files.

python -m benchmarks.tabulate [--write] [--plots FOLDER]

Every row names its file's date, so that an old figure cannot pass for a new one. A test compares
the README with what this makes.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks import plot_compare, plot_latency, plot_serving
from benchmarks.plot import has_matplotlib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DTYPES = ("float32", "bfloat16")
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
PLOTS = {
    "compare": plot_compare.draw,
    "latency": plot_latency.draw,
    "serving_sim": plot_serving.draw,
}


class Row(NamedTuple):
    """One line of the first table."""

    what: str
    paged: str
    unpaged: str
    ratio: str
    date: str


def main() -> None:
    """Prints the tables, or writes them into the README; and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tabulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="into the README, between its marks")
    parser.add_argument("--plots", type=pathlib.Path, help="a folder for a PNG of each result")
    options = parser.parse_args()
    if options.plots and not (options.plots.is_dir() and has_matplotlib()):
        parser.error("--plots needs a folder that exists, and matplotlib; install jpaged[plot]")
    reports = newest(RESULTS)
    if options.write:
        README.write_text(with_tables(README.read_text(), tables(reports)))
    else:
        print(tables(reports), end="")
    for (name, dtype), report in reports.items():
        if options.plots and name in PLOTS:
            PLOTS[name](report, str(options.plots / f"{name}-{dtype}.png"))


def newest(folder: pathlib.Path) -> dict[tuple[str, str], dict]:
    """The last report on a CPU of each benchmark and dtype: names of files begin with dates."""
    found = {}
    for file in sorted(folder.glob("*-cpu-*.json")):
        report = json.loads(file.read_text())
        if report.get("established") is False:
            continue  # its note says why
        found[report["benchmark"], report.get("dtype", "float32")] = report
    return found


def tables(reports: dict[tuple[str, str], dict]) -> str:
    """Markdown: rows of every benchmark that has some, then other engines, a column for each."""
    rows = [
        row
        for (name, dtype), make in _makers()
        if (name, dtype) in reports
        for row in make(reports[name, dtype])
    ]
    made = [_table(Row._fields, rows)]
    compared = [reports["compare", dtype] for dtype in DTYPES if ("compare", dtype) in reports]
    if compared:
        made.append(_beside_others(compared))
    return "\n".join(made)


def with_tables(text: str, made: str) -> str:
    """The text with the tables between its marks. Raises ValueError where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected {BEGIN!r} and {END!r} once each")
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + made + END + rest.partition(END)[2]


def _makers() -> Iterator[tuple[tuple[str, str], Callable[[dict], Iterator[Row]]]]:
    makers = {
        "throughput": _throughput,
        "serving_sim": _serving,
        "step": _step,
        "latency": _latency,
        "long_context": _long_context,
        "startup": _startup,
    }
    for name, make in makers.items():
        for dtype in DTYPES:
            yield (name, dtype), make


def _throughput(report: dict) -> Iterator[Row]:
    speeds = {side: found["tokens_per_s"] for side, found in report["sides"].items()}
    pairs = {
        "tokens/s, an unpaged row reserves 2048 tokens": ("paged", "unpaged"),
        "the same, it reserves 768": ("paged", "unpaged tight"),
        "tokens/s, each with all the KV memory it can use": ("paged ceiling", "unpaged ceiling"),
        "the first line with attention in plain XLA": ("paged xla", "unpaged"),
    }
    for what, (ours, other) in pairs.items():
        if ours in speeds and other in speeds:
            ratio = speeds[ours] / speeds[other]
            yield Row(
                what, f"{speeds[ours]:.0f}", f"{speeds[other]:.0f}", f"{ratio:.1f}", report["date"]
            )


def _serving(report: dict) -> Iterator[Row]:
    objective = report["objective"]
    what = (
        f"requests/s within TTFT p99 {objective['p99_ttft_ms'] / 1e3:g} s and ITL p99 "
        f"{objective['p99_itl_ms'] / 1e3:g} s"
    )
    paged = report["sides"]["paged"]["highest_rate"]
    for side, users in report["users_served"].items():
        other = report["sides"][side]["highest_rate"]
        if users is not None:
            yield Row(
                f"{what}, {side}", f"{paged:.3g}", f"{other:.3g}", f"{users:.1f}", report["date"]
            )


def _step(report: dict) -> Iterator[Row]:
    for found in report["results"]:
        share = f", {found['roof']['share']:.0%} of the roof" if "roof" in found else ""
        yield Row(
            f"decode step in ms, {found['batch']} x {found['context']}, {report['dtype']}",
            f"{found['paged_ms']:.0f}{share}",
            f"{found['unpaged_ms']:.0f}",
            f"{found['ratio']:.2f} of the time",
            report["date"],
        )


def _latency(report: dict) -> Iterator[Row]:
    ours, other = (report["sides"][side]["median_e2el_ms"] / 1e3 for side in ("paged", "unpaged"))
    yield Row(
        f"seconds a batch of {report['batch_size']}, {report['input_len']} tokens in and "
        f"{report['output_len']} out, {report['dtype']}",
        f"{ours:.1f}",
        f"{other:.1f}",
        f"{report['paged_of_unpaged']['e2el']:.2f} of the time",
        report["date"],
    )


def _beside_others(compared: list[dict]) -> str:
    """Output tokens a second of every engine, and in brackets how many times as many are ours."""
    sides = list(dict.fromkeys(side for report in compared for side in report["sides"]))
    versions = {
        side: ready["version"] for report in compared for side, ready in report["sides"].items()
    }
    rows = []
    for report in compared:
        for name, by_side in report["sets"].items():
            cells = [
                ""
                if (found := by_side.get(side)) is None
                else f"{found['output_throughput']:.0f}"
                + ("" if side == "jpaged" else f" ({found['jpaged_of_it']:.2f})")
                for side in sides
            ]
            rows.append([f"{name}, {report['dtype']}", *cells, report["date"]])
    # Of a long version, what a release is called by.
    names = [f"{side} {versions[side].split('-')[0].split(' ')[0]}" for side in sides]
    return _table(["tokens/s", *names, "date"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _long_context(report: dict) -> Iterator[Row]:
    for found in report["results"]:
        yield Row(
            f"a two-layer model behind {found['context']:,} tokens: ms a decoded token",
            f"{found['decode_ms']:.2f}, temporaries {found['temporary_bytes'] / 1e6:.2f} MB",
            "",
            "",
            report["date"],
        )


def _startup(report: dict) -> Iterator[Row]:
    for kind, what in (("cold_s", "nothing cached"), ("cached_s", "programs cached")):
        yield Row(
            f"seconds from `python` to the first token, {what}",
            f"{report[kind]:.1f}",
            "",
            "",
            report["date"],
        )


if __name__ == "__main__":
    main()
