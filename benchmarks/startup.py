"""How long jpaged takes to start, with its caches empty and with them filled.

python -m benchmarks.startup [--repeats 3]

Each start is a fresh process: import jax, import jpaged beyond it, load the model and compile until
the first token is told. Cold starts have an empty home folder, and so no compiled programs and no
compiled C++ kernel; a cached start follows each in the same folder. Figures are medians. Peak
memory is the process's own, beside the bytes of weights and pool.
"""

import argparse
import json
import os
import pathlib
import site
import statistics
import subprocess
import sys
import tempfile

from benchmarks.arguments import at_least_one
from benchmarks.measure import provenance
from benchmarks.others import OthersShare

BARS = {
    "cold_s": 15.0,
    "cached_s": 6.0,
    "import_jpaged_s": 0.2,
    "programs": 12,
    "peak_rss_of_weights_and_pool": 1.15,
}
TIMES = (
    "import_jax_s",
    "import_jpaged_s",
    "load_s",
    "first_token_s",
    "load_to_first_token_s",
    "start_to_first_token_s",
)


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    starts: dict[str, list[dict]] = {"cold": [], "cached": []}
    for turn in range(options.repeats):
        with tempfile.TemporaryDirectory() as home:
            for kind, found in starts.items():  # in the same folder, which the first fills
                found.append(_start(options, pathlib.Path(home)))
                seconds = found[-1]["start_to_first_token_s"]
                print(
                    f"round {turn + 1}/{options.repeats}: {kind}: {seconds:.2f} s", file=sys.stderr
                )
    report = _report(starts)
    _print_table(report)
    print(json.dumps({**report, **provenance()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", default="auto")
    add("--num-blocks", type=at_least_one, help="in the pool; by default what memory allows")
    add("--max-num-seqs", type=at_least_one, help="sequences that run at once")
    add("--max-num-batched-tokens", type=at_least_one, help="tokens of a step")
    add("--repeats", type=at_least_one, default=3, help="starts of either kind")
    options = parser.parse_args()
    if options.num_blocks == 1:
        parser.error("--num-blocks must be at least 2: the first is the null block")
    return options


def _start(options: argparse.Namespace, home: pathlib.Path) -> dict:
    """What one fresh process says of its start."""
    names = ("model", "dtype", "num_blocks", "max_num_seqs", "max_num_batched_tokens")
    given = {name: getattr(options, name) for name in names}
    load = OthersShare()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup_probe", json.dumps(given)],
        env=environment(home),
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"a start failed with exit code {done.returncode}; its words are above")
    return {**json.loads(done.stdout.splitlines()[-1]), "others_share": load.now()}


def environment(home: pathlib.Path) -> dict[str, str]:
    """This process's, but with every cache that a start fills in `home`.

    Models and packages stay where they are.
    """
    old = pathlib.Path.home()
    kept = {
        "HF_HOME": str(old / ".cache" / "huggingface"),
        "PYTHONUSERBASE": site.getuserbase(),
    }
    return {
        **kept,
        **os.environ,
        "HOME": str(home),
        "JAX_COMPILATION_CACHE_DIR": str(home / "xla"),
    }


def _report(starts: dict[str, list[dict]]) -> dict:
    everything = starts["cold"] + starts["cached"]
    last = everything[-1]
    held = last["weights_bytes"] + last["pool_bytes"]
    peaks = [one["peak_rss_bytes"] for one in everything]
    cold = _medians(starts["cold"])
    cached = _medians(starts["cached"])
    figures = {
        "cold_s": cold["start_to_first_token_s"],
        "cached_s": cached["start_to_first_token_s"],
        "import_jpaged_s": _median(everything, "import_jpaged_s"),
        "programs": last["programs"],
        "peak_rss_of_weights_and_pool": (
            None if None in peaks else round(statistics.median(peaks) / held, 3)
        ),
    }
    return {
        "benchmark": "startup",
        "repeats": len(starts["cold"]),
        **figures,
        "bars": BARS,
        "within_bar": {
            name: None if value is None else value <= BARS[name] for name, value in figures.items()
        },
        "cold": cold,
        "cached": cached,
        "lazy_compiles": last["lazy_compiles"],
        "weights_mib": round(last["weights_bytes"] / 2**20, 1),
        "pool_mib": round(last["pool_bytes"] / 2**20, 1),
        "peak_rss_mib": [None if peak is None else round(peak / 2**20, 1) for peak in peaks],
        "model": last["model"],
    }


def _medians(starts: list[dict]) -> dict:
    shares = [one["others_share"] for one in starts]
    return {
        **{name: _median(starts, name) for name in TIMES},
        "seconds": [round(one["start_to_first_token_s"], 2) for one in starts],
        "others_share": None if None in shares else statistics.median(shares),
    }


def _median(starts: list[dict], name: str) -> float:
    return round(statistics.median(one[name] for one in starts), 3)


def _print_table(report: dict) -> None:
    print(f"{'seconds, median':26} {'cold':>8} {'cached':>8}")
    for name in TIMES:
        label = name.removesuffix("_s").replace("_", " ")
        print(f"{label:26} {report['cold'][name]:8.2f} {report['cached'][name]:8.2f}")
    print(
        f"weights {report['weights_mib']} MiB, pool {report['pool_mib']} MiB, peak memory "
        f"{report['peak_rss_mib']} MiB; {report['lazy_compiles']} lazy compiles"
    )
    print(f"{'':30} {'found':>8} {'bar':>8}")
    for name, bar in BARS.items():
        value, within = report[name], report["within_bar"][name]
        verdict = "" if within is None else "kept" if within else "missed"
        found = "unknown" if value is None else f"{value:.2f}"
        print(f"{name.replace('_', ' '):30} {found:>8} {bar:8g} {verdict}")


if __name__ == "__main__":
    main()
