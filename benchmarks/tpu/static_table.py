"""The rows of `benchmarks.tpu_static` as a table in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

_COLUMNS = (
    ("chip", "{chip}"),
    ("heads", "{heads}"),
    ("context or new tokens", "{context}"),
    ("probe", "{probe}"),
    ("tile", "{tile}"),
    ("cycles a tile", "{tile_cycles}"),
    ("cycles a row", "{kernel_cycles}"),
    ("KV / peak", "{memory_cycles}"),
    ("us", "{us}"),
    ("bytes/cycle", "{bytes_per_cycle} of {peak_bytes_per_cycle}"),
    ("roof", "{roof:.0%}"),
    ("steady", "{steady_roof:.0%}"),
    ("KV", "{kv_of_ideal:.2f}x"),
    ("bundles, in the loop", "{bundles}, {turn_bundles}"),
    ("spills, fills", "{spills}, {fills}"),
    ("MATMUL", "{matmul_use:.0%}"),
    ("VALU", "{valu_use:.0%}"),
    ("MXU", "{matrix_roof:.0%}"),
    ("compile s", "{compile_seconds:.1f}"),
)
_SHAPE_COLUMNS = 4  # that a row without figures has as well


def table_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A headline, and a line for each row; one without figures says why."""
    titles = [title for title, _ in _COLUMNS]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    return lines + [row_line(row) for row in rows]


def row_line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    shown = {**row, "heads": "/".join(map(str, row["heads"]))}
    if "reason" in row:
        cells = [form.format(**shown) for _, form in _COLUMNS[:_SHAPE_COLUMNS]]
        return f"| {' | '.join(cells)} | none: {row['reason']} |"
    shown["tile"] = " ".join(f"{name} {value}" for name, value in row["tile"].items())
    return f"| {' | '.join(form.format(**shown) for _, form in _COLUMNS)} |"
