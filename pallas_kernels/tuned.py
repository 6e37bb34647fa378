"""Tables of tuned cuts: JSON beside the kernels, an entry for each shape that was tried."""

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

TABLE = "tiles.json"


@functools.cache
def read_table(package: str) -> Mapping[str, Mapping[str, Any]]:
    """Every entry of a package's table: its cut, and where the choice came from."""
    return json.loads(importlib.resources.files(package).joinpath(TABLE).read_text())


def entry_name(
    kernel: str, *, chip: str, heads: tuple[int, int, int], dtype: str, block_size: int
) -> str:
    """The key of an entry: kernel, chip, query heads/KV heads/head size, pool and block size.

    Neither rows nor lengths are in it: what else is computed must not change a row's bits.
    """
    return f"{kernel} {chip} {'/'.join(map(str, heads))} {dtype} {block_size}"
