"""Where a decode step's time goes on the device: kernels by name, and what lies between them."""

import pathlib
import re
import tempfile
from collections import defaultdict
from typing import Any

import jax

from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.step import STEPS, Case, compiled_cases, run_without_waiting
from benchmarks.step import paged_step

DEVICE = "/device:GPU:0"
SHOWN = 16  # kernels of a step


def run(settings: Settings, record: Record) -> None:
    """Records each shape's step, kernel by kernel."""
    for case in compiled_cases(settings, record, backends=(settings.backend,)):
        record.begin(case.name)
        with tempfile.TemporaryDirectory() as folder:
            _trace(case, folder)
            (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
            record(case.name, _summary(jax.profiler.ProfileData.from_file(str(path))))


def _trace(case: Case, folder: str) -> None:
    paged_step(case.engine, case.rows, case.context - STEPS - 2)()
    plan = case.engine.scheduler.schedule()
    assert plan is not None, "every row goes on"
    run_without_waiting(case.engine, plan)
    with jax.profiler.trace(folder):
        run_without_waiting(case.engine, plan)


def _summary(data: Any) -> dict:
    """Milliseconds of a step from its first kernel to the next step's, and of each kind in it."""
    plane = data.find_plane_with_name(DEVICE)
    lines = [] if plane is None else [line for line in plane.lines if "Stream" in (line.name or "")]
    events = [event for line in lines for event in line.events]
    if not events:
        return {"ok": True, "error": f"the profile shows nothing of {DEVICE}"}
    microseconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        kind = re.sub(r"(_\d+)+$", "", event.name)
        microseconds[kind] += event.duration_ns / 1e3 / STEPS
        counts[kind] += 1
    start = min(event.start_ns for event in events)
    end = max(event.start_ns + event.duration_ns for event in events)
    ranked = sorted(microseconds, key=lambda kind: -microseconds[kind])
    return {
        "ok": True,
        "ms": round((end - start) / 1e6 / STEPS, 3),
        "busy_ms": round(sum(microseconds.values()) / 1e3, 3),
        "kernels": round(len(events) / STEPS, 1),
        "kinds": {
            kind: f"{microseconds[kind]:.1f} us in {counts[kind] / STEPS:g}"
            for kind in ranked[:SHOWN]
        },
    }
