"""A trace of steps as a timeline, in the format that chrome://tracing and ui.perfetto.dev open."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jpaged.trace import StepRecord

# In the order in which a step does them; what is left of its time comes after them.
PHASES = ("schedule", "send", "wait", "commit")
COUNTED = {
    "rows": ("prefills", "decodes"),
    "queue": ("waiting",),
    "blocks": ("blocks_used", "blocks_cached"),
    "tokens": ("tokens", "generated_tokens"),
    "prefix hits": ("hit_tokens",),
    "moved blocks": ("copied_blocks", "swapped_out_blocks", "swapped_in_blocks"),
    "preemptions": ("preemptions",),
}
MICROSECONDS = 1e6


def save_trace(steps: Sequence[StepRecord], path: str | os.PathLike) -> None:
    """Writes what `llm.trace()` recorded to a JSON file for chrome://tracing or ui.perfetto.dev.

    A step is a slice, and in it what the host did: `schedule` and `send` of the steps that it gave
    to the device, `wait` for the oldest in flight, `commit` of its tokens. While the host waits,
    the device computes; a `wait` of no length says that the device had to wait for the host. The
    counters beside it hold a step's figures from its beginning to the next one's.

    Args:
        steps: the list that `with llm.trace() as steps` gives.
        path: of the file, which is written over.

    Raises:
        TypeError: `steps` is no such list.
        OSError: the file cannot be written.
    """
    if not isinstance(steps, Sequence) or not all("schedule_seconds" in step for step in steps):
        raise TypeError(
            "steps must be what `with llm.trace() as steps` gives, a list of dicts; got "
            f"{type(steps).__name__}"
        )
    document = {"traceEvents": list(_events(steps)), "displayTimeUnit": "ms"}
    pathlib.Path(path).write_text(json.dumps(document), encoding="utf-8")


def _events(steps: Sequence[StepRecord]) -> Iterator[dict[str, Any]]:
    yield _event("M", "process_name", args={"name": "jpaged"})
    yield _event("M", "thread_name", args={"name": "host"})
    for step in steps:
        begun = start = step["time"] - step["seconds"]
        figures = {name: step[name] for names in COUNTED.values() for name in names}
        yield _slice(f"step {step['step']}", start, step["seconds"], args=figures)
        for phase in PHASES:
            seconds = step[f"{phase}_seconds"]
            if seconds:
                yield _slice(phase, start, seconds)
            start += seconds
        for name, keys in COUNTED.items():
            counts = {key: step[key] for key in keys}
            yield _event("C", name, ts=begun * MICROSECONDS, args=counts)


def _slice(name: str, start: float, seconds: float, **more: Any) -> dict[str, Any]:
    times = {"ts": start * MICROSECONDS, "dur": seconds * MICROSECONDS}
    return _event("X", name, **times, **more)


def _event(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"ph": kind, "name": name, "pid": 1, "tid": 1, **more}
