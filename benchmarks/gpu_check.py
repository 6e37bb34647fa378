"""Everything that needs a GPU, checked and measured by one command: `make gpu-check`.

python -m benchmarks.gpu_check [--parts correctness decode ...] [--budget SECONDS] [--resume]

Each part runs in a process of its own under a time limit. One that exceeds its own limit hangs, and
the check says in what; one that the budget ends is cut short, and one that gets no time is not
begun. The results file is written after every part, and a result stays in it, with its origin,
until there is another of its name: --resume leaves out what the file has of the same commit, GPU,
JAX, backend and scale, and measures all other results anew. Exits with 1 where a part failed, found
something wrong or found nothing, with 3 where time was short.
"""

import argparse
import hashlib
import importlib.metadata
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.processes import PartProcess
from benchmarks.gpu.reports import (
    UNKNOWN,
    collect_drafts,
    draft_path,
    is_same,
    merge,
    read_report,
    results_of,
    write_report,
)
from benchmarks.gpu.table import part_lines

# In order, each with the seconds it may take: what others need comes first, and what is new on any
# GPU after what is known to run; peers are not ours.
LIMITS = {
    "correctness": 150,
    "ceiling": 25,
    "decode": 150,
    "prefill": 85,
    "writes": 40,
    "parity": 110,
    "step": 90,
    "throughput": 75,
    "mosaic": 210,
    "peers": 75,
    "torch_peers": 90,
    "serving": 75,
    "torch_serving": 120,
    "profile": 60,
    "candidates": 150,
}
NOT_BY_DEFAULT = ("profile", "candidates", "serving", "torch_serving")
BY_PYTORCH = ("torch_peers", "torch_serving")  # which needs the memory that JAX would take
UNTIMED = ("correctness", "parity")
BUDGET_S = 510  # with its start and end, less than the ten minutes that a command often has
LEAST_S = 10  # with less a part is not begun
BACKEND_HELP = "the kernels under test; on Hopper pallas-gpu brings mosaic-gpu with it"
RESULTS = pathlib.Path(__file__).parent / "results"
PROBE = "import flax, jax; print(jax.devices()[0].platform)"
PROBE_S = 90  # far more than a sound driver takes
TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Runs the parts, prints a table last."""
    options = _options()
    deadline = time.monotonic() + options.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if options.scale != "toy" and (reason := _missing_here()):
        sys.exit(reason)
    machine = _machine()
    path = pathlib.Path(options.out) if options.out else _default_path(machine, options.scale)
    head = _head(options, machine)
    report = read_report(path, head)
    origins = {part: _origin(part, head, options) for part in options.parts}
    parts = [part for part in options.parts if not _is_done(report, origins[part], part, options)]
    skipped = _run(_groups(parts), origins, options, report, path, deadline)
    _print_table(report, path)
    if skipped:
        print(f"== no time for {', '.join(skipped)}: go on with --resume, or raise --budget")
    sys.exit(_exit_status(report, origins, skipped))


def _run(
    groups: list[list[str]],
    origins: dict[str, dict],
    options: argparse.Namespace,
    report: dict,
    path: pathlib.Path,
    deadline: float,
) -> list[str]:
    """Runs the groups in order while there is time; the parts for which there was none.

    Whatever ends it, no process is left behind, and what parts had found is in the file.
    """
    workers, waiting = [], _start(groups[:1], path)
    try:
        for index in range(len(groups)):
            if deadline - time.monotonic() < LEAST_S:
                return [part for later in groups[index:] for part in later]
            workers, waiting = waiting, _start(groups[index + 1 : index + 2], path)
            for worker in workers:
                worker.go(_settings(worker.part, origins[worker.part], options, report))
            for worker in workers:
                limit = options.limit or LIMITS[worker.part]
                _add(worker, worker.result(limit, deadline), origins[worker.part], options, report)
                write_report(path, report)
                print(part_lines(worker.part, report["parts"][worker.part])[0], flush=True)
    finally:
        for worker in (*workers, *waiting):
            worker.kill()
        collect_drafts(path, report)
        write_report(path, report)
    return []


def _add(
    worker: PartProcess, found: dict, origin: dict, options: argparse.Namespace, report: dict
) -> None:
    """Merges what the part has found; that must be something."""
    merge(report, worker.part, {"origin": origin, **found})
    merged = report["parts"][worker.part]
    if merged["status"] == "done" and not results_of(merged, origin):
        why = "" if options.only is None else f": no name in it contains --only {options.only!r}"
        merged |= {"status": "failed", "error": f"it has no results{why}"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = [part for part in LIMITS if part not in NOT_BY_DEFAULT]
    add("--parts", nargs="+", default=default, metavar="PART", help=f"of {' '.join(LIMITS)}")
    add(
        "--budget",
        type=float,
        default=BUDGET_S,
        help="seconds in all; what does not fit is cut short",
    )
    add("--limit", type=float, help="seconds a part, in place of its own limit")
    add("--backend", default="pallas-gpu", help=BACKEND_HELP)
    add("--candidates", metavar="FILE", nargs="+", default=[], help="other configurations to time")
    add("--only", metavar="TEXT", help="attention at the shapes whose name contains it")
    add("--resume", action="store_true", help="leave out what the results file has of the same")
    add("--out", metavar="FILE.json", help="by default benchmarks/results/<date>-<device>.json")
    add("--commit", help="of the code, where git cannot tell; without it nothing is of the same")
    add("--seed", type=int, default=secrets.randbelow(2**16), help="by default another every time")
    add("--scale", choices=["full", "toy"], default="full", help="toy: tries the harness, on a CPU")
    options = parser.parse_args()
    options.parts = [name for names in options.parts for name in names.split(",")]
    unknown = [part for part in options.parts if part not in LIMITS]
    if unknown:
        parser.error(f"no such part: {unknown}; there are {', '.join(LIMITS)}")
    if options.candidates and "candidates" not in options.parts:
        options.parts.append("candidates")
    return options


def _groups(parts: list[str]) -> list[list[str]]:
    """The parts that run at the same time, in order: those that time nothing run together."""
    together = [part for part in parts if part in UNTIMED]
    groups = [[part] for part in parts if part not in UNTIMED]
    return [together, *groups] if together else groups


def _start(groups: list[list[str]], path: pathlib.Path) -> list[PartProcess]:
    return [
        PartProcess(part, draft_path(path, part), is_shared=len(group) > 1 or part in BY_PYTORCH)
        for group in groups
        for part in group
    ]


def _settings(part: str, origin: dict, options: argparse.Namespace, report: dict) -> dict:
    ceiling = report["parts"].get("ceiling", {}).get("results", {})
    reads = [found["gbps"] for name, found in ceiling.items() if name.startswith("read")]
    is_known = options.resume and origin["commit"] != UNKNOWN
    known = results_of(report["parts"].get(part), origin) if is_known else {}
    return {
        "backend": options.backend,
        "scale": options.scale,
        "seed": options.seed,
        "candidates": options.candidates,
        "only": options.only,
        "read_gbps": max(reads, default=None),
        "known": list(known),
        "origin": origin,
    }


def _missing_here() -> str | None:
    """Why this Python cannot run the check, or None."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        found = f"it finds no device within {PROBE_S} s"
    else:
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        last = said[-1] if said else f"exit status {done.returncode}"
        if done.returncode == 0 and last == "gpu":
            return None
        found = f"its JAX has a {last} alone" if done.returncode == 0 else f"it says {last!r}"
    return (
        f"gpu_check needs a Python whose JAX has a CUDA device, and flax. Of {sys.executable}: "
        f"{found}. Name another one (make gpu-check PYTHON=...), or install 'jax[cuda13]' and "
        "flax in it"
    )


def _machine() -> dict[str, str]:
    """The GPU and its driver, as its own tool names them."""
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    answer = _output(command)
    if answer is None:
        return {"gpu": "none"}
    names = ("gpu", "driver", "memory", "max_sm_clock", "max_memory_clock")
    return dict(zip(names, answer.splitlines()[0].split(", "), strict=False))


def _output(command: list[str]) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _default_path(machine: dict[str, str], scale: str) -> pathlib.Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    toy = "-toy" if scale == "toy" else ""
    return RESULTS / f"{time.strftime('%Y-%m-%d')}-{device}{toy}.json"


def _head(options: argparse.Namespace, machine: dict[str, str]) -> dict[str, Any]:
    return {
        "benchmark": "gpu_check",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": options.commit or _commit(),
        "machine": machine,
        "command": " ".join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]]),
    }


def _commit() -> str:
    """Of the code here; changes to it have a name of their own, which is the same if they are."""
    commit = _output(["git", "describe", "--always", "--exclude=*", "--abbrev=12"])
    if commit is None:
        return UNKNOWN
    code = ["*.py", "*.cc", "pallas_kernels/*.json"]
    changes = _output(["git", "diff", "HEAD", "--", *code])
    if changes is None:
        return commit
    return f"{commit}-dirty-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"


def _origin(part: str, head: dict, options: argparse.Namespace) -> dict[str, str]:
    """Of what the part's results will be."""
    origin = {
        "commit": head["commit"],
        "date": head["date"],
        "gpu": head["machine"]["gpu"],
        "jax": importlib.metadata.version("jax"),
        "backend": options.backend,
        "scale": options.scale,
    }
    if part == "candidates":
        origin["candidates"] = " ".join(options.candidates)
    return origin


def _is_done(report: dict, origin: dict, part: str, options: argparse.Namespace) -> bool:
    """Whether there is nothing of the part left to be found."""
    found = report["parts"].get(part)
    if not options.resume or found is None or found["status"] != "done":
        return False
    return is_same(found["origin"], origin) and found["settings"]["only"] == options.only


def _print_table(report: dict, path: pathlib.Path) -> None:
    print(f"\n== {report['machine']} commit {report['commit']} -> {path}")
    for part, found in report["parts"].items():
        print("\n".join(part_lines(part, found)))
    wrong = [
        f"{part}: {name}"
        for part, found in report["parts"].items()
        for name, result in found["results"].items()
        if not result.get("ok", True)
    ]
    states = ", ".join(f"{part} {found['status']}" for part, found in report["parts"].items())
    print(f"== {states}\n== {len(wrong)} wrong {wrong[:10] or ''}")


def _exit_status(report: dict, origins: dict[str, dict], skipped: list[str]) -> int:
    """Of the parts that were asked for, and of results that are of the same as this run."""
    begun = {part: report["parts"][part] for part in origins if part not in skipped}
    results = [
        result
        for part, found in begun.items()
        for result in results_of(found, origins[part]).values()
    ]
    states = [found["status"] for found in begun.values()]
    if "failed" in states or not all(result.get("ok", True) for result in results):
        return 1
    return 3 if skipped or "cut short" in states else 0


if __name__ == "__main__":
    main()
