"""What the result files of a CPU say, as tables in Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Reports = Mapping[tuple[str, str], dict]  # by benchmark and dtype
DTYPES = ("float32", "bfloat16")
TRACES = {
    "sharegpt_1024_first_turn_smollm2_lengths.csv": "ShareGPT, first turns",
    "sharegpt_lengths.csv": "ShareGPT, whole conversations",
    "azure_llm_2023_conv.csv": "Azure 2023, conversation",
    "azure_llm_2023_code.csv": "Azure 2023, code",
    "mooncake_conversation.jsonl": "Mooncake, conversation",
}


class Row(NamedTuple):
    """One line of the table beside an unpaged model."""

    what: str
    paged: str
    unpaged: str
    ratio: str
    date: str


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paged(reports: Reports) -> str:
    """Beside the unpaged baseline: rows of every benchmark that has some."""
    makers: dict[str, Callable[[dict], Iterator[Row]]] = {
        "throughput": _throughput,
        "serving_sim": _serving,
        "step": _step,
        "latency": _latency,
        "long_context": _long_context,
        "startup": _startup,
        "load_memory": _load_memory,
    }
    rows = [
        row
        for name, make in makers.items()
        for dtype in DTYPES
        if (name, dtype) in reports
        for row in make(reports[name, dtype])
    ]
    return table(Row._fields, rows)


def engines(reports: Reports) -> str:
    """Output tokens a second of every engine, and in brackets how many times as many are ours."""
    compared = [reports["compare", dtype] for dtype in DTYPES if ("compare", dtype) in reports]
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
    return table(["tokens/s", *names, "date"], rows)


def memory(reports: Reports) -> str:
    """What paging does to memory, trace by trace."""
    head = (
        "trace",
        "waste",
        "one slab of the longest wastes",
        "at once, of such slabs",
        "blocks that n = 2, 4, 6 answers save",
    )
    rows = []
    for found in reports["memory", "float32"]["reports"]:
        saved = ", ".join(f"{100 * shared['measured']:.0f}" for shared in found["sharing"])
        rows.append(
            (
                TRACES[found["lengths"]],
                f"{100 * found['waste']:.2g} %",
                f"{100 * found['maximum_wastes']:.0f} %",
                f"{found['at_once']:.1f} times as many",
                f"{saved} %",
            )
        )
    return table(head, rows)


def savings(reports: Reports) -> str:
    """What sharing and swapping do to speed."""
    pairs = {pair["work"]: pair for pair in reports["savings", "float32"]["pairs"]}
    answers = [name for name in pairs if name.startswith("n = ")]
    numbers = ", ".join(name.removeprefix("n = ") for name in answers)
    lines = {
        f"n = {numbers} answers to a prompt, its blocks shared": answers,
        "one system prompt of 512 tokens, cached": ["system prompt"],
        "a crowd that is preempted: swapped to host memory, or computed again": ["a crowd"],
    }
    rows = []
    for what, names in lines.items():
        of = [list(pairs[name]["sides"].values()) for name in names]
        with_it, without = (
            ", ".join(f"{sides[i]['tokens_per_s']:.0f}" for sides in of) for i in (0, 1)
        )
        ratios = [f"{ours['tokens_per_s'] / other['tokens_per_s']:.2g}" for ours, other in of]
        rows.append((what, with_it, without, ", ".join(ratios)))
    return table(("on SmolLM2, tokens/s", "with it", "without", "ratio"), rows)


def speedups(reports: Reports) -> str:
    """Paged over unpaged, by what is compared: bytes, batch, one user."""
    rows = [row[:4] for row in _throughput(reports["throughput", "float32"])]
    shapes = {
        (8, 300): "ms of a decode step in equal batch, 8 rows of 300 tokens",
        (1, 300): "ms of a decode step for one user, 1 row of 300 tokens",
    }
    steps = {
        (found["batch"], found["context"]): found for found in reports["step", "float32"]["results"]
    }
    for shape, what in shapes.items():
        found = steps[shape]
        speed = f"{1 / found['ratio']:.2f} times the speed"
        rows.append((what, f"{found['paged_ms']:.0f}", f"{found['unpaged_ms']:.0f}", speed))
    return table(("you compare", "paged", "unpaged", "paged over unpaged"), rows)


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


def _long_context(report: dict) -> Iterator[Row]:
    for found in report["results"]:
        what = f"a two-layer model behind {found['context']:,} tokens: ms a decoded token"
        temporaries = f"temporaries {found['temporary_bytes'] / 1e6:.2f} MB"
        yield _ours(what, f"{found['decode_ms']:.2f}, {temporaries}", report)


def _startup(report: dict) -> Iterator[Row]:
    for kind, state in (("cold_s", "nothing cached"), ("cached_s", "programs cached")):
        what = f"seconds from `python` to the first token, {state}"
        yield _ours(what, f"{report[kind]:.1f}", report)


def _load_memory(report: dict) -> Iterator[Row]:
    for found in report["rows"]:
        what = f"host memory while weights load, {found['form']}, {found['dtype']}"
        yield _ours(what, f"{found['ratio']:.2f} times the weights", report)


def _ours(what: str, figure: str, report: dict) -> Row:
    """A figure that an unpaged model has no match for."""
    return Row(what, figure, "", "", report["date"])
