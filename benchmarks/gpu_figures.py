"""What the result files of a GPU say, as a table in Markdown."""

from collections.abc import Sequence

from benchmarks.figures import table

SHAPES = {
    "32/8/128": ("256 x 2048", "64 x 4096", "8 x 4096", "1 x 1024"),
    "9/3/64": ("64 x 4096", "1 x 1024"),
}
COLUMNS = {
    "jpaged": ("pallas-gpu",),
    "FlashInfer": ("flashinfer",),
    "cuDNN paged": ("cudnn paged",),
    "FlashAttention 3": ("fa3 1 splits", "fa3 4 splits", "fa3 16 splits"),
    "JAX's own": ("jax paged_attention",),
    "contiguous, `jax.numpy`": ("contiguous",),
    "contiguous, SDPA": ("sdpa",),
}


def attention(reports: Sequence[dict]) -> str:
    """Microseconds of one layer's decode attention; of each, the last run that has it."""
    rows = []
    for heads, shapes in SHAPES.items():
        for shape in shapes:
            times = {
                column: min(microseconds(reports, f"{heads} {shape} {name}") for name in names)
                for column, names in COLUMNS.items()
            }
            share = read_share(reports, f"{heads} {shape} {COLUMNS['jpaged'][0]}")
            ours, *others = map(_short, times.values())
            rows.append((f"{heads}, {shape}", ours, f"{share:.0%}", *others))
    first, *rest = COLUMNS
    head = ("heads, rows x context", first, "of read bandwidth", *rest)
    return table(head, rows)


def microseconds(reports: Sequence[dict], name: str) -> float:
    """Of the last run that timed it."""
    return _last(reports, name)["us"]


def read_share(reports: Sequence[dict], name: str) -> float:
    """What a kernel reads a second, of what a plain sum reads."""
    return _last(reports, name)["gbps"] / _last(reports, "read sum")["gbps"]


def _last(reports: Sequence[dict], name: str) -> dict:
    found = [
        part["results"][name]
        for report in reports
        for part in report["parts"].values()
        if name in part["results"]
    ]
    if not found:
        raise ValueError(f"no result file has {name!r}")
    return found[-1]


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 20 else f"{number:.1f}"
