"""The loop: schedule, run, commit; and the way back when a step fails."""

import collections
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jpaged.beam_sequences import take_candidates
from jpaged.beams import Candidates
from jpaged.errors import EngineFailedError
from jpaged.new_weights import checked_params
from jpaged.outputs import Logprob
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.requests import Request, Sequence
from jpaged.runner import Runner
from jpaged.sampling import TopLogprobs
from jpaged.scheduler import Scheduler
from jpaged.stats import Stats, collect_stats
from jpaged.step import StepOutput
from jpaged_models import Tokenizer

MAX_FAILURES = 2  # a request whose steps fail this often is given up


class Engine:
    """Scheduler and runner, kept in agreement.

    While the device computes a step the next one is planned and sent, so that it never waits for
    the host; each step's tokens feed the next on the device, and are fetched one step late.

    After any exception out of a step, an interrupt too, everything on the device that may be lost
    is made anew and what was in flight is computed again: no finished text is lost.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self._in_flight: collections.deque[Sent] = collections.deque()
        self._at_work: StepPlan | None = None  # whose fault an exception is
        self._unsettled = False  # a step began, and neither it nor its recovery came to an end

    def step(self) -> list[Sequence]:
        """Waits for one step, and runs those after it; the sequences that got a token or ended."""
        ended: list[Sequence] = []
        try:
            if self._unsettled:
                ended = self._recover()
            self._unsettled = True
            self._send()
            if self._in_flight:
                ended += self._take_in(self._in_flight.popleft())
            self._drop_given_up()
            self._unsettled = False
        except BaseException as error:
            plan = self._at_work
            ended += self._recover()
            if plan is None or not isinstance(error, Exception):
                raise
            ended += self._give_up(plan, error)
            # The scheduler may have forgotten these before the exception, and nobody was told.
            rest = [row.sequence for row in plan.rows if row.sequence not in ended]
            ended += [sequence for sequence in rest if sequence.finished]
        return ended

    def update_weights(self, params: Any) -> list[Sequence]:
        """Gives the network other parameters, for what is computed from now on.

        No program is compiled. What runs goes on from its tokens so far, computed anew; steps in
        flight are dropped, and the prefix cache is emptied: what the pool held is the old
        parameters' work. Returns the sequences that turned out to be finished. Raises ValueError
        or TypeError, with nothing changed, for parameters of another model.
        """
        checked = checked_params(params, self.runner.step.abstract_params())
        self.runner.replace_params(checked)
        self._in_flight.clear()
        return self.scheduler.start_over()

    def close(self) -> None:
        """Deletes the device arrays at once, whoever still refers to them."""
        self._in_flight.clear()
        self.runner.close()

    def stats(self) -> Stats:
        """The figures of scheduler and runner at this moment."""
        runner = self.runner
        return collect_stats(
            self.scheduler, compiles=runner.num_programs, lazy_compiles=runner.lazy_compiles
        )

    def _send(self) -> None:
        """Gives the device one step to compute, and another to go on with."""
        self._drop_given_up()
        num_ahead = 1 if self.scheduler.config.async_scheduling else 0
        while len(self._in_flight) <= num_ahead:
            start = time.perf_counter()
            plan = self.scheduler.schedule()
            if plan is None:
                return
            self._at_work, planned = plan, time.perf_counter()
            self._in_flight.append(Sent(plan, self.runner.run(plan, _outputs_for(plan))))
            self._at_work = None
            self.scheduler.counters.schedule_seconds += planned - start
            self.scheduler.counters.send_seconds += time.perf_counter() - planned

    def _take_in(self, sent: "Sent") -> list[Sequence]:
        """Waits for the step; the sequences that got a token or ended."""
        plan, counters = sent.plan, self.scheduler.counters
        self._at_work, start = plan, time.perf_counter()
        fetched = fetch(sent.out, plan, self.tokenizer)
        arrived = time.perf_counter()
        ended = self.scheduler.commit(plan, fetched.tokens, fetched.logprobs)
        for request in take_candidates(plan, fetched.candidates):
            ended += self.scheduler.advance(request)
        counters.wait_seconds += arrived - start
        counters.commit_seconds += time.perf_counter() - arrived
        self._at_work = None
        return ended

    def _drop_given_up(self) -> None:
        """Forgets what nobody waits for: the scheduler has started over, or has no request left."""
        if not self.scheduler.in_flight:
            self._in_flight.clear()

    def _recover(self) -> list[Sequence]:
        """Starts the device side anew; the sequences that turned out to be finished."""
        self._in_flight.clear()
        self._at_work = None
        ended = self.scheduler.recover()
        if self.runner.is_lost:
            self.runner.reset()
        self._unsettled = False
        return ended

    def _give_up(self, plan: StepPlan, error: Exception) -> list[Sequence]:
        """Counts the failure against each request of the plan; ends those that failed before."""
        hopeless: list[Request] = []
        in_flight = {row.sequence.request.request_id: row.sequence.request for row in plan.rows}
        for request in in_flight.values():
            request.num_failures += 1
            if request.num_failures >= MAX_FAILURES:
                hopeless.append(request)
        failure = EngineFailedError(f"a step failed {MAX_FAILURES} times: {error!r}")
        failure.__cause__ = error
        return self.scheduler.fail(hopeless, failure)


class Sent(NamedTuple):
    """A step that the device was given, and the results it will have."""

    plan: StepPlan
    out: StepOutput


class Fetched(NamedTuple):
    """A step's results, an entry for each row of its plan; those of a row may be None."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None] | None = None
    candidates: list[Candidates | None] | None = None


def fetch(out: StepOutput, plan: StepPlan, tokenizer: Tokenizer | None) -> Fetched:
    """The step's results on the host: the one place that waits for the device."""
    tokens = np.asarray(out.tokens)[: len(plan.rows)].tolist()
    if out.logprobs is None:
        return Fetched(tokens)
    top = TopLogprobs(*jax.device_get(out.logprobs))
    rows = range(len(plan.rows))
    return Fetched(
        tokens,
        [_row_logprobs(plan, i, tokens[i], top, tokenizer) for i in rows],
        [_row_candidates(plan, i, top) for i in rows],
    )


def _outputs_for(plan: StepPlan) -> Outputs:
    requests = [row.sequence.request for row in plan.rows if row.samples]
    if any(request.search is not None for request in requests):
        return Outputs.BEAMS
    wants_logprobs = any(request.params.num_logprobs is not None for request in requests)
    return Outputs.LOGPROBS if wants_logprobs else Outputs.TOKENS


def _row_logprobs(
    plan: StepPlan, i: int, token: int, logprobs: TopLogprobs, tokenizer: Tokenizer | None
) -> dict[int, Logprob] | None:
    """The sampled token's entry first, then the likeliest, as many as the request asked for."""
    wanted = plan.rows[i].sequence.request.params.num_logprobs
    if wanted is None:
        return None
    entries = {token: (float(logprobs.sampled[i]), int(logprobs.rank[i]))}
    for rank in range(min(wanted, logprobs.top.shape[1])):  # a tiny vocabulary has fewer
        top_id, top = int(logprobs.top_ids[i, rank]), float(logprobs.top[i, rank])
        entries.setdefault(top_id, (top, rank + 1))

    def text(token_id: int) -> str | None:
        return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None

    return {t: Logprob(value, rank, text(t)) for t, (value, rank) in entries.items()}


def _row_candidates(plan: StepPlan, i: int, logprobs: TopLogprobs) -> Candidates | None:
    """As many of the likeliest tokens as the row's search looks at."""
    search = plan.rows[i].sequence.request.search
    if search is None or not plan.rows[i].samples:
        return None
    top = slice(search.num_candidates)
    ids, values = logprobs.top_ids[i, top].tolist(), logprobs.top[i, top].tolist()
    return list(zip(ids, values, strict=True))
