"""What each step did, in figures for a table or a plot, while somebody asks for them."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jpaged.scheduler import Scheduler
from jpaged.stats import Counters, missing

StepRecord = dict[str, int | float]

_Result = TypeVar("_Result")


class StepRecorder:
    """Runs steps, and tells every open trace what each of them did.

    A record is the difference that the step made to the scheduler's counters, so the records of a
    trace add up to what `stats()` counts meanwhile, preemptions and failed steps included. While
    no trace is open a step costs nothing more.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._traces: list[_Trace] = []

    @contextlib.contextmanager
    def trace(self) -> Iterator[list[StepRecord]]:
        """A list that grows by a record a step, until the `with` ends."""
        trace = _Trace()
        self._traces.append(trace)
        try:
            yield trace.steps
        finally:
            self._traces.remove(trace)

    def run(self, step: Callable[[], _Result]) -> _Result:
        """What `step` returns or raises; recorded unless it found nothing to do."""
        traces = tuple(self._traces)  # another thread may open or close some meanwhile
        if not traces:
            return step()
        before, start = dataclasses.replace(self._scheduler.counters), time.perf_counter()
        try:
            return step()
        finally:
            if self._scheduler.counters != before:
                end = time.perf_counter()
                figures = _figures(self._scheduler, before)
                for trace in traces:
                    trace.add(figures, start, end)


class _Trace:
    """One reader's records, numbered and timed from when it began."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self._start = time.perf_counter()

    def add(self, figures: StepRecord, start: float, end: float) -> None:
        timing = {"step": len(self.steps) + 1, "time": end - self._start, "seconds": end - start}
        self.steps.append(timing | figures)


def _figures(scheduler: Scheduler, before: Counters) -> StepRecord:
    """One step's figures; the pool's are those while it ran, before anything was freed."""
    counters, config = scheduler.counters, scheduler.config

    def grown(name: str) -> Any:
        return getattr(counters, name) - getattr(before, name)

    blocks_used = grown("held_slots") // config.block_size
    return {
        "running": grown("rows"),
        "waiting": scheduler.num_waiting,
        "tokens": grown("computed_tokens"),
        "prefills": grown("prefill_rows"),
        "decodes": grown("decode_rows"),
        "blocks_used": blocks_used,
        "blocks_cached": grown("cached_blocks"),
        "blocks_free": config.num_blocks - 1 - blocks_used,
        "tokens_held": grown("held_tokens"),
        "waste": missing(grown("held_tokens"), grown("held_slots")),
        "saving": missing(blocks_used, grown("table_blocks")),
        "hit_tokens": grown("hit_tokens"),
        "queried_tokens": grown("queried_tokens"),
        "generated_tokens": grown("generated_tokens"),
        "copied_blocks": grown("copied_blocks"),
        "swapped_out_blocks": grown("swapped_out_blocks"),
        "swapped_in_blocks": grown("swapped_in_blocks"),
        "preemptions": grown("preemptions"),
        "recoveries": grown("recoveries"),
        "schedule_seconds": grown("schedule_seconds"),
        "send_seconds": grown("send_seconds"),
        "wait_seconds": grown("wait_seconds"),
        "commit_seconds": grown("commit_seconds"),
    }
