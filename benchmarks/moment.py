"""A replay with shared prompts in a small pool: the figures of its steps, and the pool at one."""

import dataclasses
import itertools
from collections.abc import Iterator

from benchmarks.lengths import RequestLengths
from benchmarks.scripted import make_request, run_saturated
from jpaged.config import EngineConfig
from jpaged.requests import Request
from jpaged.scheduler import Scheduler
from jpaged.snapshot import Snapshot, take_snapshot
from jpaged.trace import StepRecord, StepRecorder

NUM_REQUESTS = 60
NUM_ROWS = 16
NUM_BLOCKS = 130  # with the null block: ten lines of the drawing
NUM_PREAMBLES = 3
PREAMBLE_BLOCKS = 3
MAX_PROMPT_BLOCKS = 6  # without the preamble
MAX_ANSWER_BLOCKS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """The replay's steps; the pool at `step`, where sharing saves most while no block is empty."""

    snapshot: Snapshot
    step: int
    steps: list[StepRecord]


def replay_moment(lengths: list[RequestLengths], *, block_size: int) -> Moment:
    """Runs the first requests, each behind one of three preambles, some with two answers.

    Lengths are clipped to a few blocks, so that whole tables can be drawn.
    """
    scheduler = Scheduler(
        EngineConfig(
            block_size=block_size,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=NUM_ROWS,
            max_num_batched_tokens=16 * block_size,
            max_model_len=block_size * (PREAMBLE_BLOCKS + MAX_PROMPT_BLOCKS + MAX_ANSWER_BLOCKS)
            + 1,
        )
    )
    recorder, most, best = StepRecorder(scheduler), (False, -1), None
    plans = run_saturated(scheduler, _requests(lengths[:NUM_REQUESTS], block_size))
    with recorder.trace() as steps:
        while (plan := recorder.run(lambda: next(plans, None))) is not None:
            num_free = NUM_BLOCKS - 1 - plan.use.num_blocks
            merit = num_free == plan.use.num_cached, plan.use.num_entries - plan.use.num_blocks
            if merit > most:
                most, best = merit, (len(steps) + 1, take_snapshot(scheduler))
    if best is None:
        raise ValueError("there are no requests to replay; give at least one")
    return Moment(step=best[0], snapshot=best[1], steps=steps)


def _requests(lengths: list[RequestLengths], block_size: int) -> Iterator[Request]:
    """Prompts whose first blocks are one of the preambles and whose rest is their own."""
    for index, pair in enumerate(lengths):
        clipped = pair.clipped(
            max_input=MAX_PROMPT_BLOCKS * block_size, max_output=MAX_ANSWER_BLOCKS * block_size
        )
        preamble = [index % NUM_PREAMBLES] * PREAMBLE_BLOCKS * block_size
        own = itertools.repeat(NUM_PREAMBLES + index, clipped.input_tokens)
        yield make_request(index, [*preamble, *own], clipped.output_tokens, n=1 + index % 2)
