"""How much host memory loading a model takes, beside the bytes of its weights.

python -m benchmarks.load_memory [--model MODEL] [--also MODEL...]

A model is loaded as it lies and as `jpaged convert` keeps it, each time by a fresh process that has
started JAX before. Counted is that process's anonymous memory, looked at from outside: its peak
while the weights load, over what it held just before. Pages of a mapped file are not counted; the
system takes them back when it wants. On an accelerator the weights themselves are not in it.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import IO

from benchmarks.measure import host_provenance
from benchmarks.process_memory import memory_bytes

BAR = 1.2  # peak over weights
DTYPES = ("float32", "bfloat16")
LOOK_EVERY_S = 0.001


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    if memory_bytes("RssAnon") is None:
        sys.exit("benchmarks.load_memory: expected a system with /proc, which tells memory by kind")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            rows += [load(model, dtype) for model in (options.model, *options.also)]
            kept = str(pathlib.Path(folder, dtype))
            _convert(options.model, kept, dtype)
            rows.append(load(kept, dtype))
    print(f"{'form':12} {'dtype':10} {'weights MB':>10} {'peak MB':>10} {'ratio':>8} {'bar':>6}")
    for row in rows:
        weights, peak = row["weights_bytes"] / 1e6, row["peak_bytes"] / 1e6
        verdict = "kept" if row["ratio"] <= BAR else "missed"
        print(
            f"{row['form']:12} {row['dtype']:10} {weights:10.1f} {peak:10.1f} {row['ratio']:8.3f} "
            f"{BAR:6} {verdict}"
        )
    report = {"benchmark": "load_memory", "rows": rows, "bar": BAR}
    print(json.dumps({**report, **host_provenance()}))


def load(model: str | None, dtype: str) -> dict:
    """One load by a process of its own, and the most that it held meanwhile."""
    probe = [sys.executable, "-m", "benchmarks.load_probe", json.dumps([model, dtype])]
    with subprocess.Popen(
        probe, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _line(process.stdout)
        before = peak = _anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while (now := _anonymous_bytes(process.pid)) and process.poll() is None:
            peak = max(peak, now)
            time.sleep(LOOK_EVERY_S)
        told = json.loads(_line(process.stdout))
    return {
        "dtype": dtype,
        "peak_bytes": peak - before,
        "ratio": round((peak - before) / told["weights_bytes"], 3),
        **told,
    }


def _line(stream: IO[str]) -> str:
    line = stream.readline()
    if not line:
        raise SystemExit("a load failed; its words are above")
    return line


def _anonymous_bytes(pid: int) -> int:
    """Of a process; 0 for one that has ended and still waits to be asked how."""
    return memory_bytes("RssAnon", pid) or 0


def _convert(model: str | None, directory: str, dtype: str) -> None:
    source = [] if model is None else [model]
    convert = [sys.executable, "-m", "jpaged.cli", "convert", *source, directory, "--dtype", dtype]
    # Not here, where JAX may have one owner; what it prints is not ours.
    subprocess.run(convert, stdout=subprocess.DEVNULL, check=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--also", nargs="*", default=[], metavar="MODEL", help="loaded as it lies, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
