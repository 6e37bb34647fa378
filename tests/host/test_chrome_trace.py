"""A trace of steps as a file for a timeline viewer."""

import contextlib
import json
import pathlib
from typing import Any

import pytest

from jpaged.chrome_trace import PHASES, save_trace
from jpaged.trace import StepRecord, StepRecorder
from tests.host.scripted import bare_step, make_request, make_scheduler


def recorded() -> list[StepRecord]:
    """A trace whose steps take known times, as an engine's would."""
    scheduler = make_scheduler()
    recorder, seconds = StepRecorder(scheduler), iter(range(1, 100))

    def step() -> object:
        plan = bare_step(scheduler, num_ahead=1)
        for phase in PHASES:
            name = f"{phase}_seconds"
            setattr(scheduler.counters, name, getattr(scheduler.counters, name) + next(seconds))
        return plan

    for name in "ab":
        scheduler.add(make_request(name, 9, max_tokens=3))
    with recorder.trace() as steps:
        while scheduler.has_work:
            recorder.run(step)
    for index, record in enumerate(steps):
        record["time"], record["seconds"] = 100.0 * (index + 1), 90.0
    return steps


def test_phases_lie_end_to_end_in_their_step(tmp_path: pathlib.Path):
    steps = recorded()
    save_trace(steps, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(steps) * (1 + len(PHASES))
    for index, record in enumerate(steps):
        whole, *phases = slices[5 * index : 5 * index + 5]
        assert whole["name"] == f"step {index + 1}"
        assert (whole["ts"], whole["dur"]) == ((100 * index + 10) * 1e6, 90e6)
        assert whole["args"]["tokens"] == record["tokens"]
        assert tuple(phase["name"] for phase in phases) == PHASES
        end = whole["ts"]
        for number, phase in enumerate(phases, 4 * index + 1):
            assert (phase["ts"], phase["dur"]) == (pytest.approx(end), number * 1e6)
            end += phase["dur"]


def test_counts_are_those_of_the_records(tmp_path: pathlib.Path):
    steps = recorded()
    save_trace(steps, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    blocks = [event["args"] for event in events if (event["ph"], event["name"]) == ("C", "blocks")]
    assert [b["blocks_used"] for b in blocks] == [record["blocks_used"] for record in steps]
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["ts"] for event in counters} == {1e6 * (100 * i + 10) for i in range(len(steps))}
    assert len({event["name"] for event in counters}) * len(steps) == len(counters)


@pytest.mark.parametrize("wrong", [3, [{"time": 1.0}], contextlib.nullcontext()])
def test_what_is_no_trace_is_refused(wrong: Any, tmp_path: pathlib.Path):
    with pytest.raises(
        TypeError, match=r"what `with llm\.trace\(\) as steps` gives, a list of dic"
    ):
        save_trace(wrong, tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()


def test_an_empty_trace_is_a_file_too(tmp_path: pathlib.Path):
    save_trace([], str(tmp_path / "trace.json"))
    assert json.loads((tmp_path / "trace.json").read_text())["displayTimeUnit"] == "ms"
