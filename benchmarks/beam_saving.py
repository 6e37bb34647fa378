"""Blocks that beams save by sharing: on the lengths of a trace, and with a model's own beams."""

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator

from benchmarks.lengths import RequestLengths
from benchmarks.questions import QUESTIONS
from benchmarks.scripted import saturated_plans, scheduler_for
from benchmarks.scripted_beams import make_beam_request
from jpaged import LLM, BeamSearchParams
from jpaged.beam_sequences import take_candidates
from jpaged.beams import Candidates
from jpaged.requests import Request, Sequence
from jpaged.scheduler import Scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSaving:
    """The share of blocks that beams save over all steps, and of beams that go on from a step."""

    beam_width: int
    measured: float
    survivors: float
    copied_blocks: int
    preemptions: int


def save_beams(
    lengths: list[RequestLengths], beam_width: int, *, num_slots: int, block_size: int, seed: int
) -> BeamSaving:
    """Beams over prompts of the trace's lengths, as long as its answers, in a pool that is full.

    Nothing ends a beam early. Which ones go on follows from a seeded law: the k-th likeliest next
    token of a beam has the probability p (1 - p)^(k - 1), where p is the root of an even draw from
    0 to 1, for each beam and token anew. So as many go on as of SmolLM2's own beams.
    """
    scheduler = scheduler_for(lengths, num_slots=num_slots, block_size=block_size, caching=True)
    rng = random.Random(seed)
    with _measured(scheduler) as meter:
        for plan in saturated_plans(scheduler, _requests_of(lengths, beam_width)):
            candidates: list[Candidates | None] = [
                _candidates(beam_width, rng) if row.samples else None for row in plan.rows
            ]
            scheduler.commit(plan, [0] * len(plan.rows))
            for request in take_candidates(plan, candidates):
                scheduler.advance(request)
    return meter.saving(beam_width)


def save_model_beams(llm: LLM, beam_width: int, *, num_tokens: int) -> BeamSaving:
    """A model's own beams over the bundled questions; one may end before `num_tokens`."""
    template = llm.tokenizer.chat_template if llm.tokenizer else None
    prompts = list(QUESTIONS)
    if template is not None:
        prompts = [template.render([{"role": "user", "content": q}]) for q in QUESTIONS]
    params = BeamSearchParams(beam_width=beam_width, max_tokens=num_tokens)
    llm.reset_prefix_cache()
    with _measured(llm.engine.scheduler) as meter:
        llm.beam_search(prompts, params)
    return meter.saving(beam_width)


class _Meter:
    """Counts what a scheduler did from here on, and how many beams went on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.before = dataclasses.replace(scheduler.counters)
        self.beams = self.survivors = 0

    def advance(self, request: Request) -> list[Sequence]:
        is_first = request.sequences[0].num_output_tokens == 0
        ended = type(self.scheduler).advance(self.scheduler, request)
        if request.search is not None and not is_first:
            self.beams += len(request.search.parents)
            self.survivors += len(set(request.search.parents))
        return ended

    def saving(self, beam_width: int) -> BeamSaving:
        before, now = self.before, self.scheduler.counters
        physical = (now.held_slots - before.held_slots) // self.scheduler.config.block_size
        return BeamSaving(
            beam_width=beam_width,
            measured=1 - physical / (now.table_blocks - before.table_blocks),
            survivors=self.survivors / max(self.beams, 1),
            copied_blocks=now.copied_blocks - before.copied_blocks,
            preemptions=now.preemptions - before.preemptions,
        )


@contextlib.contextmanager
def _measured(scheduler: Scheduler) -> Iterator[_Meter]:
    """A meter that the scheduler's callers do not see."""
    meter = _Meter(scheduler)
    scheduler.advance = meter.advance
    try:
        yield meter
    finally:
        del scheduler.advance  # the class's own comes back


def _requests_of(lengths: list[RequestLengths], beam_width: int) -> Iterator[Request]:
    for index, pair in enumerate(lengths):
        params = BeamSearchParams(
            beam_width=beam_width, max_tokens=pair.output_tokens, detokenize=False
        )
        yield make_beam_request(
            str(index),
            [-index - 1] * pair.input_tokens,  # no candidate, and no other prompt's
            params,
            seed=index,
            max_model_len=pair.input_tokens + pair.output_tokens + 1,
        )


def _candidates(count: int, rng: random.Random) -> Candidates:
    p = math.sqrt(rng.uniform(1e-9, 1 - 1e-9))
    first, ratio = math.log(p), math.log1p(-p)
    return [(token, first + token * ratio) for token in range(count)]
