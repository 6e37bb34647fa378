"""The loop: schedule, run, commit; and the way back when a step fails."""

import jax
import numpy as np

from jpaged.errors import EngineFailedError
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

    After any exception out of a step, an interrupt too, everything on the device that may be lost
    is made anew and what was in flight is computed again: no finished text is lost.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self._unsettled = False  # a step began, and neither it nor its recovery came to an end

    def step(self) -> list[Sequence]:
        """Runs one step; the sequences that got a token or ended."""
        plan, ended = None, []
        try:
            if self._unsettled:
                ended = self._recover()
            self._unsettled = True
            plan = self.scheduler.schedule()
            if plan is not None:
                out = self.runner.run(plan, _outputs_for(plan))
                tokens, logprobs = fetch(out, plan, self.tokenizer)
                ended += self.scheduler.commit(plan, tokens, logprobs)
            self._unsettled = False
        except BaseException as error:
            ended += self._recover()
            if plan is None or not isinstance(error, Exception):
                raise
            ended += self._give_up(plan, error)
            # The scheduler may have forgotten these before the exception, and nobody was told.
            rest = [row.sequence for row in plan.rows if row.sequence not in ended]
            ended += [sequence for sequence in rest if sequence.finished]
        return ended

    def stats(self) -> Stats:
        """The figures of scheduler and runner at this moment."""
        runner = self.runner
        return collect_stats(
            self.scheduler, compiles=runner.num_programs, lazy_compiles=runner.lazy_compiles
        )

    def _recover(self) -> list[Sequence]:
        """Starts the device side anew; the sequences that turned out to be finished."""
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


def fetch(
    out: StepOutput, plan: StepPlan, tokenizer: Tokenizer | None
) -> tuple[list[int], list[dict[int, Logprob] | None] | None]:
    """The step's results on the host: the one place that waits for the device."""
    num_rows = len(plan.rows)
    tokens = np.asarray(out.tokens)[:num_rows].tolist()
    if out.logprobs is None:
        return tokens, None
    logprobs = TopLogprobs(*jax.device_get(out.logprobs))
    return tokens, [_row_logprobs(plan, i, tokens[i], logprobs, tokenizer) for i in range(num_rows)]


def _outputs_for(plan: StepPlan) -> Outputs:
    wants_logprobs = any(row.sequence.request.params.logprobs is not None for row in plan.rows)
    return Outputs.LOGPROBS if wants_logprobs else Outputs.TOKENS


def _row_logprobs(
    plan: StepPlan, i: int, token: int, logprobs: TopLogprobs, tokenizer: Tokenizer | None
) -> dict[int, Logprob] | None:
    """The sampled token's entry first, then the likeliest, as many as the request asked for."""
    wanted = plan.rows[i].sequence.request.params.logprobs
    if wanted is None:
        return None
    entries = {token: (float(logprobs.sampled[i]), int(logprobs.rank[i]))}
    for rank in range(min(wanted, logprobs.top.shape[1])):  # a tiny vocabulary has fewer
        top_id, top = int(logprobs.top_ids[i, rank]), float(logprobs.top[i, rank])
        entries.setdefault(top_id, (top, rank + 1))

    def text(token_id: int) -> str | None:
        return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None

    return {t: Logprob(value, rank, text(t)) for t, (value, rank) in entries.items()}
