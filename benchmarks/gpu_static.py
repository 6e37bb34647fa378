"""Registers and shared memory of the GPU kernels, without a GPU: `python -m benchmarks.gpu_static`.

    PYTHONPATH=.:models python -m benchmarks.gpu_static [--chips sm_80 ...] [--calls decode ...]
        [--heads 9/3/64 ...] [--out FILE.json]

Each row is a kernel (of Triton's: attention, copies of blocks, a write of new K and V) as it is cut
by default, in blocks of 16, and what the compiler for that chip makes of it: registers and spilled
bytes are a thread's, shared memory a program's, and `resident` is how many programs one processor
runs at a time. Every option is a window, a soft cap and sinks. Nothing is measured. A test compiles
the rows anew and compares.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.arguments import parse_heads
from benchmarks.gpu.builds import HEADS
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.static_rows import CALLS, compile_rows, make_rows, table_lines
from benchmarks.gpu.topology import missing_cuda
from benchmarks.measure import host_provenance
from benchmarks.tables import entry_lines


def main() -> None:
    """Compiles chip by chip and call by call, writes the results after each, prints a table."""
    options = _options()
    if reason := missing_cuda():
        sys.exit(reason)
    rows: dict[str, dict[str, Any]] = {}
    for chip, call in itertools.product(options.chips, options.calls):
        found, assembler = compile_rows(make_rows(chips=[chip], calls=[call], heads=options.heads))
        rows |= found
        print(f"{chip} {call}: {len(found)} rows", file=sys.stderr, flush=True)
        if options.out is not None:
            write(options.out, _origin(assembler), rows)
    print("\n".join(table_lines(rows)))


def write(path: pathlib.Path, head: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """What is true of all rows, then a row a line."""
    first = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{first},\n "rows": {entry_lines(rows)}\n}}\n')


def _origin(assembler: str | None) -> dict[str, Any]:
    host = host_provenance()
    return {
        "benchmark": "gpu_static",
        "kind": "the compiler's figures, not measured",
        "date": host["date"],
        "jax": jax.__version__,
        "ptxas": assembler,
        "command": host["command"],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--chips", nargs="+", choices=GPUS, default=list(GPUS))
    add("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    add("--heads", nargs="+", type=parse_heads, default=list(HEADS), metavar="N/K/H")
    add("--out", type=pathlib.Path, metavar="FILE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
