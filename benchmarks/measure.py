"""What every benchmark needs: interleaved medians, a count of compiles, where figures come from."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax

from benchmarks.others import OthersShare

if TYPE_CHECKING:  # what times imports imports this
    from jpaged import LLM

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileLog:
    """The compilations of this process since it was made; `events` may be cleared."""

    def __init__(self) -> None:
        self.events: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:  # noqa: ARG002
        if event == COMPILE_EVENT:
            self.events.append(event)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock seconds of repeated runs."""

    seconds: tuple[float, ...]
    others_share: float | None  # of the machine, used by other processes; None where unknown

    @property
    def median(self) -> float:
        """The middle run, in seconds."""
        return statistics.median(self.seconds)


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Times every run `repeats` times, in rounds, so that noise falls on all of them alike.

    A run returns only when its results are on the host. `prepare` gets its name just before, off
    the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            if prepare is not None:
                prepare(name)
            load, start = OthersShare(), time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            seconds[name].append(elapsed)
            share = load.now()
            if share is not None:
                shares[name].append(share)
            print(f"round {turn + 1}/{repeats}: {name}: {elapsed:.2f} s", file=sys.stderr)
    return {
        name: Timing(
            seconds=tuple(seconds[name]),
            others_share=statistics.median(shares[name]) if shares[name] else None,
        )
        for name in runs
    }


def provenance() -> dict[str, object]:
    """The device, the versions and the command, for a benchmark's JSON line."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, **host_provenance()}


def host_provenance() -> dict[str, object]:
    """The same for a benchmark that leaves the device alone."""
    packages = ("jpaged", "jax", "jaxlib", "flax", "numpy")
    return {
        "host": f"{os.cpu_count()} x {_processor()}",
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """What was measured, by git; "+" where the tree has changes. None outside a repository."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    # A package is run by its own name, though what runs is its __main__.
    return (
        spec.name.removesuffix(".__main__") if spec is not None else pathlib.Path(sys.argv[0]).name
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def block_nbytes(llm: "LLM") -> int:
    """Bytes of one block of the pool, in all layers."""
    return sum(layer.nbytes // layer.shape[0] for layer in llm.engine.runner.pool)
