"""Serves every line of a figure at every rate, and says what came of it."""

import argparse
import sys

from benchmarks.arrivals import Arrival
from benchmarks.open_loop import RealClock, replay
from benchmarks.others import OthersShare
from benchmarks.paper.figure import Line
from benchmarks.serving_metrics import run_metrics

LATENCY = "mean_normalised_latency_ms"  # what the paper draws
NUM_WARM_UP = 4  # requests
# Of the engine's counters, what a run adds to them.
COUNTED = (
    "preemptions",
    "swapped_out_blocks",
    "swapped_in_blocks",
    "computed_tokens",
    "queried_tokens",
    "hit_tokens",
)


def warm_up(lines: list[Line]) -> None:
    """Runs a little of each; every program was compiled when the line was made."""
    for line in lines:
        prompts = line.workload.prompts[:NUM_WARM_UP]
        few = [Arrival(seconds=0.0, prompt=prompt, max_tokens=4) for prompt in prompts]
        replay(line.side.start(), few, RealClock())


def measure(lines: list[Line], options: argparse.Namespace) -> list[dict]:
    """A point for each line and rate: its middle run. Lines take turns at every rate."""
    runs: dict[tuple[float, int], list[dict]] = {}
    for turn in range(options.repeats):
        for rate in options.rates:
            for number, line in enumerate(lines):
                run = _serve(line, rate)
                runs.setdefault((rate, number), []).append(run)
                print(
                    f"round {turn + 1}/{options.repeats}: {line.workload.panel}: "
                    f"{line.side.name} at {rate:g}/s: {run[LATENCY]:.0f} ms a token",
                    file=sys.stderr,
                )
    return [
        {**_labels(lines[number]), "request_rate": rate, **_middle(of_point)}
        for (rate, number), of_point in runs.items()
    ]


def _serve(line: Line, rate: float) -> dict:
    load, before = OthersShare(), _counters(line)
    server = line.side.start()
    run = replay(server, line.workload.trace.at_rate(rate, line.workload.prompts), RealClock())
    after = _counters(line)
    return {
        **run_metrics(run),
        **{name: after[name] - before[name] for name in after},
        "others_share": load.now(),
    }


def _counters(line: Line) -> dict[str, int]:
    if line.llm is None:
        return {}
    counters = line.llm.engine.scheduler.counters
    return {name: getattr(counters, name) for name in COUNTED}


def _labels(line: Line) -> dict:
    side, llm = line.side, line.llm
    return {
        "panel": line.workload.panel,
        "side": side.name,
        "block_size": llm and llm.engine.scheduler.config.block_size,
        "rows": side.rows,
        "reserved": side.reserved,
        "attention": side.attention,
        "cache_mib": round(side.cache_bytes / 2**20, 1),
    }


def _middle(runs: list[dict]) -> dict:
    """The run of median latency, the lower of two; and the latencies of all."""
    in_order = sorted(runs, key=lambda run: run[LATENCY])
    return {
        **in_order[(len(runs) - 1) // 2],
        f"each_{LATENCY}": [run[LATENCY] for run in runs],
    }
