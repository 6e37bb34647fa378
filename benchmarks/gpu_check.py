"""Everything that needs a GPU, checked and measured by one command: `make gpu-check`.

python -m benchmarks.gpu_check [--parts correctness decode ...] [--budget SECONDS] [--resume]

Each part runs in a process of its own under a time limit; a part that is cut short keeps what it
had found. The results file is written after every part, so that an interrupted check goes on with
--resume. Exits with 1 where a part failed or found something wrong, with 3 where one was cut short.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import secrets
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.gpu.table import part_lines

# In order, each with the seconds it may take: what others need comes first.
LIMITS = {
    "correctness": 110,
    "ceiling": 25,
    "decode": 150,
    "prefill": 85,
    "writes": 40,
    "parity": 110,
    "step": 75,
    "throughput": 75,
    "peers": 75,
    "torch_peers": 90,
    "profile": 60,
    "candidates": 150,
}
NOT_BY_DEFAULT = ("profile", "candidates")
UNTIMED = ("correctness", "parity")
BACKEND_HELP = "the kernels under test; on Hopper pallas-gpu brings mosaic-gpu with it"
RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    """Runs the parts, prints a table last."""
    options = _options()
    machine = _machine()
    path = pathlib.Path(options.out) if options.out else _default_path(machine)
    report = _start_report(options, machine, path)
    parts = [part for part in options.parts if not _is_done(report, part, options)]
    deadline = time.monotonic() + options.budget
    groups = _groups(parts)
    with tempfile.TemporaryDirectory() as folder:
        waiting = _start(groups[:1], folder)
        for index, group in enumerate(groups):
            workers, waiting = waiting, _start(groups[index + 1 : index + 2], folder)
            for worker in workers:
                worker.go(_settings(options, report))
            started = time.monotonic()
            for part, worker in zip(group, workers, strict=True):
                end = min(started + (options.limit or LIMITS[part]), deadline)
                origin = {"commit": report["commit"], "date": report["date"]}
                report["parts"][part] = origin | worker.result(end)
                _write(path, report)
                print(part_lines(part, report["parts"][part])[0], flush=True)
    _print_table(report, path)
    sys.exit(_exit_status(report, options.parts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = [part for part in LIMITS if part not in NOT_BY_DEFAULT]
    add("--parts", nargs="+", default=default, metavar="PART", help=f"of {' '.join(LIMITS)}")
    add("--budget", type=float, default=600, help="seconds in all; what does not fit is cut short")
    add("--limit", type=float, help="seconds a part, in place of its own limit")
    add("--backend", default="pallas-gpu", help=BACKEND_HELP)
    add("--candidates", metavar="FILE", nargs="+", default=[], help="other configurations to time")
    add("--only", metavar="TEXT", help="attention at the shapes whose name contains it")
    add("--resume", action="store_true", help="leave out the parts that the results file has done")
    add("--out", metavar="FILE.json", help="by default benchmarks/results/<date>-<device>.json")
    add("--commit", help="of the code, where git cannot tell")
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


def _start(groups: list[list[str]], folder: str) -> list["_Worker"]:
    is_shared = any(len(group) > 1 for group in groups)
    return [_Worker(part, pathlib.Path(folder), is_shared) for group in groups for part in group]


class _Worker:
    """A part's process, started ahead: it imports and waits for its settings."""

    def __init__(self, part: str, folder: pathlib.Path, is_shared: bool) -> None:
        self.path = folder / f"{part}.json"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", part, str(self.path)]
        # Processes that share a device must not each take most of its memory at once.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if is_shared else {}
        environment = {**os.environ, **shared}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)

    def go(self, settings: dict) -> None:
        """Lets the part begin."""
        assert self.process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(BrokenPipeError):  # it died; its status says so
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.close()

    def result(self, end: float) -> dict:
        """What the part has found when it is over, or at the time `end`, when it is killed."""
        timed_out = False
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            self.process.kill()
            code = self.process.wait()
        report: dict[str, Any] = {"results": {}}
        if self.path.exists():
            report = json.loads(self.path.read_text())
        if timed_out:
            report["status"] = "cut short"
        elif code:
            report["status"] = "failed"
            report.setdefault("error", f"exit status {code}")
        return report


def _settings(options: argparse.Namespace, report: dict) -> dict:
    ceiling = report["parts"].get("ceiling", {}).get("results", {})
    reads = [found["gbps"] for name, found in ceiling.items() if name.startswith("read")]
    return {
        "backend": options.backend,
        "scale": options.scale,
        "seed": options.seed,
        "candidates": options.candidates,
        "only": options.only,
        "read_gbps": max(reads, default=None),
    }


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


def _default_path(machine: dict[str, str]) -> pathlib.Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return RESULTS / f"{time.strftime('%Y-%m-%d')}-{device}.json"


def _start_report(options: argparse.Namespace, machine: dict[str, str], path: pathlib.Path) -> dict:
    commit = options.commit or _output(["git", "describe", "--always", "--dirty", "--abbrev=12"])
    head = {
        "benchmark": "gpu_check",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit or "unknown",
        "machine": machine,
        "command": " ".join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]]),
    }
    parts = {}
    if path.exists():  # what is not measured again stays, under its own date and commit
        parts = json.loads(path.read_text())["parts"]
    return {**head, "parts": parts}


def _is_done(report: dict, part: str, options: argparse.Namespace) -> bool:
    return options.resume and report["parts"].get(part, {}).get("status") == "done"


def _write(path: pathlib.Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


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


def _exit_status(report: dict, parts: list[str]) -> int:
    found = [report["parts"].get(part, {"status": "missing", "results": {}}) for part in parts]
    if any(one["status"] == "failed" or not _all_ok(one) for one in found):
        return 1
    return 0 if all(one["status"] == "done" for one in found) else 3


def _all_ok(found: dict) -> bool:
    return all(result.get("ok", True) for result in found["results"].values())


if __name__ == "__main__":
    main()
