"""Compiler estimates of TPU kernels, on a machine without a TPU: `python -m benchmarks.tpu_static`.

    PYTHONPATH=.:models python -m benchmarks.tpu_static [--chips v5e v6e] [--probes decode ...]
        [--heads 9/3/64 ...] [--contexts 4096 ...] [--resume] [--out FILE.json]

Every figure comes from libtpu's compiler: none was measured. A row is one sequence; its time is the
larger of the estimated cycles and of its KV bytes over the peak of the memory, because the model
lets copies in flight have the whole bandwidth each. `roof` is the share that the visible tokens'
bytes, or their products if these take longer, have in that time; `MXU` is the products' share.
`steady` is the same of a tile in the middle of many: a probe has one or two rows, and its first
copies hide behind nothing. MATMUL and VALU are the shares of those slots that are used in the
kernel's loop that multiplies most. Compile seconds are the least of a row's compilations.

Writes are of 64 and 256 decodes, each in a group of slots of its own, and of a chunk of 512 tokens
in whole groups; their bytes are those of whole groups, and a tile is a group. `write-xla` is all of
XLA's program.

What the estimator does, tried on small kernels with libtpu 0.0.52:

- A loop of a known number of turns costs that number of turns, exactly: 4, 8 and 16 copies of 256
  KiB took 4620, 8220 and 15420 cycles on a v6e. A loop of an unknown number is taken as 42 turns.
- A loop that holds a loop is taken as two turns, however many it makes. A grid is not: 4 and 8
  steps of a loop of 4 copies took 15610 and 30190. So loops in a tile's loop are unrolled here.
- Scalars are followed: `pl.when` and `cond` go by their condition if it can be known, and skip the
  body if it comes from memory. A kernel that reads its lengths seems almost free until they are
  replaced by numbers.
- One copy moves 491 bytes a cycle on a v5e, 1251 on a v5p (more than a core's share of the chip),
  776 on a v6e and 1689 on a tpu7x.
- It aborts on a v4, on operands of scalar prefetch that the same program computes (so a probe is
  the Pallas call alone, `benchmarks/tpu/probe.py`), and on code that it cannot type; such a row
  says so.
"""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.arguments import parse_heads
from benchmarks.measure import host_provenance
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.rows import HEADS, PROBES, estimate_row, make_rows
from benchmarks.tpu.static_table import row_line, table_lines
from benchmarks.tpu.topology import missing_libtpu


def main() -> None:
    """Estimates row by row, and writes the results after each."""
    options = _options()
    if reason := missing_libtpu():
        sys.exit(reason)
    report = _start_report(options)
    rows = make_rows(
        probes=options.probes,
        chips=options.chips,
        heads=options.heads,
        contexts=options.contexts,
    )
    origin = _origin()
    for row in rows:
        if row.name not in report["rows"]:
            report["rows"][row.name] = estimate_row(row, timeout=options.timeout) | origin
            _write(options.out, report)
        print(row_line(report["rows"][row.name]), file=sys.stderr, flush=True)
    print("Compiler estimates, not measured.\n")
    print("\n".join(table_lines(report["rows"][row.name] for row in rows)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    add("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    add("--heads", nargs="+", type=parse_heads, default=list(HEADS), metavar="N/K/H")
    add("--contexts", nargs="+", type=int, help="of those that a probe has")
    add("--timeout", type=int, default=300, help="seconds for one compilation")
    add("--resume", action="store_true", help="leave out the rows that the results file has")
    add("--out", type=pathlib.Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.resume and options.out is None:
        parser.error("--resume needs the --out of the run that it goes on with")
    known = {probe: PROBES[probe][2] for probe in options.probes}
    unknown = set(options.contexts or ()).difference(*known.values())
    if unknown:
        have = "; ".join(f"{probe} has {' '.join(map(str, own))}" for probe, own in known.items())
        parser.error(f"--contexts: no probe has {' '.join(map(str, sorted(unknown)))}; {have}")
    return options


def _start_report(options: argparse.Namespace) -> dict[str, Any]:
    """What is true of all rows; where a row is from stands in it, since a run may go on later."""
    rows = {}
    if options.resume and options.out.exists():
        found = json.loads(options.out.read_text())
        older = {name: found[name] for name in ("date", "commit") if name in found}
        older |= found.get("versions", {})  # files of before said it once for all
        rows = {name: older | row for name, row in found["rows"].items()}
    return {"benchmark": "tpu_static", "kind": "compiler estimates, not measured", "rows": rows}


def _origin() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    host = host_provenance()
    return {"date": host["date"], "commit": _commit(), **versions, "command": host["command"]}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _write(path: pathlib.Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
