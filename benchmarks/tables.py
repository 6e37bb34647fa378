"""Tables of tuned cuts as they are written: what an entry is for, an entry a line."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels.tuned import entry_name

ESTIMATE, WALL_TIME = "compiler estimate", "wall time"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What an entry of a table is for."""

    kernel: str
    chip: str
    heads: tuple[int, int, int]
    dtype: str
    block_size: int

    @property
    def name(self) -> str:
        """Its key in the table."""
        return entry_name(
            self.kernel,
            chip=self.chip,
            heads=self.heads,
            dtype=self.dtype,
            block_size=self.block_size,
        )


def merge(path: pathlib.Path, entries: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Puts entries into the file, in order; others stay, and so do times where estimates come.

    None takes an entry out.
    """
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, entry in entries.items():
        if entry is None:
            table.pop(name, None)
        elif entry["source"] == WALL_TIME or table.get(name, entry)["source"] != WALL_TIME:
            table[name] = entry
    path.write_text(entry_lines({name: table[name] for name in sorted(table)}) + "\n")


def entry_lines(entries: Mapping[str, Any]) -> str:
    """JSON with an entry a line."""
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n}" if lines else "{}"
