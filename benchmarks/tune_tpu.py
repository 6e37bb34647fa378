"""Fills the table of TPU tiles: `python -m benchmarks.tune_tpu`.

    PYTHONPATH=.:models python -m benchmarks.tune_tpu [--chips v5e v6e] [--heads 9/3/64 ...]
        [--dtypes bfloat16 ...] [--block-sizes 16 ...] [--kernels decode prefill] [--out FILE]

On a machine with a TPU tiles are timed on it; without one they are compiled for `--chips` and
estimated, as `benchmarks.tpu_static` explains. Each entry says which it was: `cycles` are of 512
tokens of a row's context, for prefill under 512 queries, and `us` of a whole call (16 rows of
4096 tokens, or the last 512 tokens of so many). An estimate never replaces a time.
"""

import argparse
import functools
import importlib.metadata
import itertools
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks.aot import ROOT
from benchmarks.arguments import parse_heads
from benchmarks.tables import ESTIMATE, WALL_TIME, Shape, merge
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.rows import HEADS
from benchmarks.tpu.topology import missing_libtpu
from benchmarks.tpu.trials import compiles, compiles_here, estimate, time_here
from benchmarks.tpu.tuning import KERNELS, Tried, search
from pallas_kernels.tpu.device import STREAMED_DTYPES, SUBLANES
from pallas_kernels.tpu.tiles import target_chip
from pallas_kernels.tuned import TABLE

TABLE_PATH = ROOT / "pallas_kernels" / "tpu" / TABLE


def main() -> None:
    """Tunes shape by shape, and writes the table after each."""
    options = _options()
    source, measure, fits, chips = ESTIMATE, estimate, compiles, options.chips or list(CHIPS)
    if jax.devices()[0].platform == "tpu":
        source, measure, fits, chips = WALL_TIME, time_here, compiles_here, _chip_here(options)
    elif reason := missing_libtpu():
        sys.exit(reason)
    shapes = itertools.product(
        options.block_sizes, options.dtypes, options.heads, chips, options.kernels
    )
    for block_size, dtype, heads, chip, kernel in shapes:
        shape = Shape(kernel=kernel, chip=chip, heads=heads, dtype=dtype, block_size=block_size)
        found = search(shape, functools.partial(measure, shape), functools.partial(fits, shape))
        if found is None:
            print(f"{shape.name}: no tile compiles", flush=True)
            continue
        merge(options.out, {shape.name: make_entry(found, source)})
        print(f"{shape.name}: {found}", flush=True)


def make_entry(found: Tried, source: str) -> dict[str, Any]:
    """What the table says of a tile."""
    if source == WALL_TIME:
        figures = {"us": found.time}
    else:
        figures = {"cycles": found.time, "spills": found.spills, "fills": found.fills}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    date = time.strftime("%Y-%m-%d")
    return {"tile": found.tile, "source": source, **figures, **versions, "date": date}


def _chip_here(options: argparse.Namespace) -> list[str]:
    chip = target_chip()
    if chip is None or options.chips not in (None, [chip]):
        sys.exit(f"times are taken on the TPU at hand, {chip}; --chips names {options.chips}")
    return [chip]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--chips", nargs="+", choices=CHIPS, help="to estimate for; default: all of them")
    add("--heads", nargs="+", type=parse_heads, default=list(HEADS), metavar="N/K/H")
    add("--dtypes", nargs="+", choices=STREAMED_DTYPES, default=["bfloat16"], help="of the pool")
    add("--block-sizes", nargs="+", type=_block_size, default=[16, 64])
    add("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--out", type=pathlib.Path, default=TABLE_PATH, metavar="FILE")
    return parser.parse_args()


def _block_size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0 or int(text) % SUBLANES:
        raise argparse.ArgumentTypeError(f"expected a multiple of {SUBLANES}, got {text}")
    return int(text)


if __name__ == "__main__":
    main()
