"""Fills the table of GPU tiles: `python -m benchmarks.tune_gpu --survivors FILE.json`.

    PYTHONPATH=.:models python -m benchmarks.tune_gpu --survivors FILE.json [--chips sm_80 sm_90a]
        [--heads 9/3/64 ...] [--dtypes bfloat16 ...] [--block-sizes 16 ...]
        [--kernels decode prefill] [--out FILE.json]

Cuts are enumerated for each shape and compiled for `--chips`, without a GPU. What spills registers
or has more shared memory than the chip is left out, and of the rest at most eight are kept, which
`benchmarks.gpu.tuning` says how it chooses: the file of survivors has them with their registers,
shared memory and programs of a processor. `benchmarks.gpu_check --candidates` times them, too.

On a machine with a GPU they are timed at once, beside the formula's cut, at the batches of
`benchmarks.gpu_check`. A cut enters the table if it is 3 % faster in the geometric mean over them
and at none 3 % slower; else the formula stays, and an older entry goes. What the file of survivors
has for this version of JAX, compiled or timed, is not done again. On a machine with a GPU survivors
of another version do as well, if they are of this formula: what spilled there is left out all the
same, and what is slow here shows when it is timed.
"""

import argparse
import itertools
import json
import pathlib
import secrets
import sys
import time
from typing import Any

import jax

from benchmarks.aot import ROOT
from benchmarks.arguments import BLOCK_SIZES, parse_heads
from benchmarks.gpu.candidates import COMPILED, SURVIVORS, chip_here, cut_name
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.decode import HEADS
from benchmarks.gpu.topology import missing_cuda
from benchmarks.gpu.trials import find_survivors, formula, time_cuts
from benchmarks.gpu.tuning import KERNELS, Cut, choose, mean
from benchmarks.tables import WALL_TIME, Shape, entry_lines, merge
from pallas_kernels.gpu.common import DTYPES
from pallas_kernels.gpu.device import target_chip
from pallas_kernels.tuned import TABLE, entry_name

TABLE_PATH = ROOT / "pallas_kernels" / "gpu" / TABLE


def main() -> None:
    """Goes shape by shape, and writes both files after each."""
    options = _options()
    is_here = jax.devices()[0].platform == "gpu"
    chips = _chip_here(options) if is_here else options.chips or list(GPUS)
    shapes: Any = itertools.product(
        chips, options.block_sizes, options.dtypes, options.heads, options.kernels
    )
    for chip, block_size, dtype, heads, kernel in shapes:
        shape = Shape(kernel=kernel, chip=chip, heads=heads, dtype=dtype, block_size=block_size)
        record = _known(options.survivors, shape)
        if record is not None and not is_here and record["jax"] != jax.__version__:
            record = None
        if record is None:
            if reason := missing_cuda():
                sys.exit(f"{shape.name} is not in {options.survivors}, and {reason}")
            record = find_survivors(shape)
            _write(options.survivors, shape, record)
        print(f"{shape.name}: {len(record[SURVIVORS])} of {record['tried']} cuts", flush=True)
        if not is_here:
            continue
        name = _table_name(shape)
        device = f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"
        if device not in record.setdefault("times", {}):
            cuts = [record["formula"], *map(_without_figures, record[SURVIVORS])]
            older = [entry["config"] for key, entry in _read(options.out).items() if key == name]
            record["times"][device] = time_cuts(shape, cuts + older, seed=options.seed)
            _write(options.survivors, shape, record)
        entry = make_entry(record["formula"], record["times"][device])
        merge(options.out, {name: entry})
        print(f"{name}: {entry or 'the formula stays'}", flush=True)


def make_entry(ours: Cut, times: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """What the table says of the best cut; None where it is the formula's."""
    best = choose(times, cut_name(ours))
    if best == cut_name(ours):
        return None
    fields = dict(field.split("=") for field in best.split())
    return {
        "config": {name: int(value) for name, value in fields.items()},
        "source": WALL_TIME,
        "us": round(mean(times[best]), 2),
        "formula_us": round(mean(times[cut_name(ours)]), 2),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _known(path: pathlib.Path, shape: Shape) -> dict[str, Any] | None:
    """What the file has of a shape, if it is of this formula."""
    record = _read(path).get(shape.name)
    return record if record is not None and record["formula"] == formula(shape) else None


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: pathlib.Path, shape: Shape, record: dict[str, Any]) -> None:
    records = _read(path) | {shape.name: record}
    path.write_text(entry_lines({name: records[name] for name in sorted(records)}) + "\n")


def _without_figures(survivor: dict[str, Any]) -> Cut:
    return {field: value for field, value in survivor.items() if field != COMPILED}


def _table_name(shape: Shape) -> str:
    """The key of an entry for the GPU at hand: by its name, since H100 and H200 are one chip."""
    chip = target_chip()
    assert chip is not None, "there is a GPU at hand"
    fields = {"heads": shape.heads, "dtype": shape.dtype, "block_size": shape.block_size}
    return entry_name(shape.kernel, chip=chip, **fields)


def _chip_here(options: argparse.Namespace) -> list[str]:
    chip = chip_here()
    if chip is None or options.chips not in (None, [chip]):
        sys.exit(f"times are taken on the GPU at hand, {chip}; --chips names {options.chips}")
    return [chip]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--chips", nargs="+", choices=GPUS, help="to compile for; default: all, or the one at hand")
    add("--heads", nargs="+", type=parse_heads, default=list(HEADS), metavar="N/K/H")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of queries and pool")
    add("--block-sizes", nargs="+", type=int, choices=BLOCK_SIZES, default=[16])
    add("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--survivors", type=pathlib.Path, required=True, metavar="FILE.json")
    add("--out", type=pathlib.Path, default=TABLE_PATH, metavar="FILE.json")
    add("--seed", type=int, default=secrets.randbelow(2**16), help="of what is timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
