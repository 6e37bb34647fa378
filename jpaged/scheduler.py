"""Requests from their arrival to their end, step by step, whatever goes wrong between."""

import collections
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from jpaged import beam_sequences
from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.errors import QueueFullError
from jpaged.finish import finish, settle
from jpaged.outputs import Logprob
from jpaged.plan import StepPlan
from jpaged.planner import Planner
from jpaged.requests import FinishReason, Request, Sequence
from jpaged.stats import Counters
from jpaged.swapping import Swapping
from jpaged.waiting import WaitingQueue


class Scheduler:
    """Continuous batching over a pool of blocks, by priority and then first come first served.

    `schedule` plans a step (how, says `Planner`), the caller runs it, `commit` takes in its tokens.
    One more step may be planned before that: of it a token of each row is not known yet, and what
    it computes for a sequence that turns out to have ended is nobody's. It was written into that
    sequence's own unhashed tail, and whoever gets these blocks next writes to them in a later step.

    An exception may leave everything but `requests` half changed; `recover` rebuilds the rest.
    """

    def __init__(self, config: EngineConfig, *, eos_token_ids: Iterable[int] = ()) -> None:
        self.config = config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: dict[str, Request] = {}
        self.counters = Counters()
        self._num_arrivals = 0
        self._free_all()
        self._torn = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.requests)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold a row, in order."""
        return self._planner.running

    @property
    def waiting(self) -> WaitingQueue:
        """The sequences that hold nothing yet, or no more."""
        return self._planner.waiting

    @property
    def pool(self) -> BlockPool:
        """Who holds which block."""
        return self._planner.pool

    @property
    def swapping(self) -> Swapping:
        """What lies in host memory."""
        return self._planner.swapping

    @property
    def in_flight(self) -> tuple[StepPlan, ...]:
        """The plans that are neither committed nor given up, oldest first."""
        return tuple(self._in_flight)

    @property
    def free_rows(self) -> list[int]:
        """The rows that nobody holds."""
        return self._planner.free_rows

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.waiting)

    @property
    def num_tokens_held(self) -> int:
        """Tokens whose K/V are in the pool for a running sequence, shared ones counted once."""
        return self._planner.num_tokens_held

    def add(self, request: Request) -> None:
        """Queues each sequence of `request`, or raises and changes nothing."""
        self.mend()
        self.validate(request)
        self.check_room(len(request.sequences))
        self._torn = True
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        for sequence in request.sequences:
            sequence.max_num_tokens = self._max_num_tokens(request)
            self.waiting.add(sequence)
        self.counters.prompt_tokens += len(request.prompt_token_ids)
        self.requests[request.request_id] = request  # last: from here on the request is ours
        self._torn = False

    def validate(self, request: Request) -> None:
        """Raises ValueError for a request that could never be taken or never run to its end."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by a running request")
        self.config.check_lengths(
            len(request.prompt_token_ids),
            request.params.max_tokens,
            num_beams=request.num_together,
        )
        if (num_sequences := len(request.sequences)) > self.config.max_waiting:
            raise ValueError(
                f"the request has {num_sequences} sequences, which wait until a step starts them, "
                f"and max_waiting is {self.config.max_waiting}; lower n, or raise max_waiting"
            )

    def check_room(self, num_sequences: int) -> None:
        """Raises QueueFullError where so many sequences more would be too many that wait."""
        self.mend()
        num_waiting, most = len(self.waiting), self.config.max_waiting
        if num_waiting + num_sequences > most:
            raise QueueFullError(
                f"{num_waiting} sequences wait, {num_sequences} more came, and max_waiting is "
                f"{most}; send them when some have started, fewer at once, or raise max_waiting"
            )

    def schedule(self) -> StepPlan | None:
        """Plans the next step; None when there is nothing to do, or nothing before a commit."""
        self.mend()
        assert len(self._in_flight) <= 1, "a plan is either committed or given up by recover()"
        if self._in_flight and not self._planner.can_plan_beyond(self._in_flight[-1]):
            return None
        if not self.running and not self.waiting:
            return None
        self._torn = True
        self.pool.cache.settle()
        plan = self._planner.plan()
        if plan is not None:
            self._in_flight.append(plan)
        self._torn = False
        return plan

    def commit(
        self,
        plan: StepPlan,
        token_ids: SequenceOf[int],
        logprobs: SequenceOf[dict[int, Logprob] | None] | None = None,
    ) -> list[Sequence]:
        """Takes in what the oldest step in flight sampled; the sequences that got a token.

        `token_ids` and `logprobs` have one entry for each row of the plan, ignored where the row
        does not sample. Sequences that have ended since are passed over; nothing is taken from a
        plan that was given up since.
        """
        assert not self._torn, "an abort was cut short since: recover() comes first"
        if plan not in self._in_flight:
            return []
        assert plan is self._in_flight[0], "plans are committed in the order of their making"
        num_rows = len(plan.rows)
        if len(token_ids) != num_rows or (logprobs is not None and len(logprobs) != num_rows):
            raise ValueError(f"the plan has {num_rows} rows, got {len(token_ids)} token ids")
        self._torn = True
        changed = []
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            if sequence.finished:
                continue
            if row.samples and sequence.request.search is None:  # else `advance` brings tokens
                self._take(sequence, int(token_ids[index]), logprobs[index] if logprobs else None)
                changed.append(sequence)
        self.counters.add_step(plan, self.config.block_size)
        self.counters.steps += 1
        self._in_flight.popleft()
        self._drop_finished(changed)
        self._torn = False
        return changed

    def advance(self, request: Request) -> list[Sequence]:
        """Takes a search one token on whose live beams all have candidates; what ended with it.

        That is nothing, or all sequences of the request.
        """
        assert not self._torn, "a call was cut short since: recover() comes first"
        self._torn = True
        self.counters.generated_tokens += beam_sequences.advance(request)
        beam_sequences.follow(request, self.pool)
        ended = [sequence for sequence in request.sequences if sequence.hypothesis is not None]
        for sequence in ended:
            settle(sequence, self.eos_token_ids, again=True)
        self._drop_finished(ended)
        self._torn = False
        return ended

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while sequences hold blocks."""
        self.mend()
        if self.running:
            return False
        self._torn = True
        self.pool.forget_cached()
        self._torn = False
        return True

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends what is unfinished of the request; nothing when it is unknown or already over."""
        request = self.requests.get(request_id)
        return [] if request is None else self._end([request], "abort")

    def fail(self, requests: Iterable[Request], error: BaseException) -> list[Sequence]:
        """Ends what is unfinished of `requests` with the reason "error"."""
        known = [request for request in requests if request.request_id in self.requests]
        for request in known:
            request.error = error
        return self._end(known, "error")

    def recover(self) -> list[Sequence]:
        """Starts over after an exception, and counts it; the sequences found finished."""
        found = self.start_over()
        self.counters.recoveries += 1
        return found

    def start_over(self) -> list[Sequence]:
        """Rebuilds everything from `requests`, with an empty cache; the sequences found finished.

        All that is unfinished waits again, with nothing computed and nothing in flight. A token
        that was taken in is kept, and checked in case an exception came before its check.
        """
        self._torn = True
        for plan in self._in_flight:
            self.counters.add_step(plan, self.config.block_size)
        self._free_all()
        found = []
        for request in list(self.requests.values()):
            if request.search is not None:
                beam_sequences.restore(request)
            for sequence in request.sequences:
                sequence.forget_device()
                sequence.num_in_flight = 0
                if not sequence.finished:
                    settle(sequence, self.eos_token_ids, again=True)
                if sequence.finished:
                    found.append(sequence)
                else:
                    self.waiting.add(sequence)
            if request.finished:
                del self.requests[request.request_id]
        self._torn = False
        return found

    def mend(self) -> None:
        """Recovers if the last call here was cut short and its caller did not."""
        if self._torn:
            self.recover()

    def _max_num_tokens(self, request: Request) -> int:
        most, max_tokens = self.config.max_model_len, request.params.max_tokens
        return most if max_tokens is None else min(most, len(request.prompt_token_ids) + max_tokens)

    def _free_all(self) -> None:
        """Makes all that is held free, and both queues empty."""
        self._in_flight: collections.deque[StepPlan] = collections.deque()
        self._planner = Planner(self.config)

    def _take(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        if logprobs is not None:  # before the token, which is what makes both count
            sequence.logprobs.append(logprobs)
            sequence.cumulative_logprob += logprobs[token].logprob
        sequence.token_ids.append(token)
        sequence.num_in_flight -= 1
        self.counters.generated_tokens += 1
        settle(sequence, self.eos_token_ids)
        if len(sequence.token_ids) % self.config.block_size == 0 and not sequence.finished:
            self._planner.take_in_block(sequence)

    def _end(self, requests: list[Request], reason: FinishReason) -> list[Sequence]:
        self.mend()
        self._torn = True
        ended = [s for request in requests for s in request.sequences if not s.finished]
        for sequence in ended:
            if sequence.request.search is not None:  # beams have no text before they end
                settle(sequence, self.eos_token_ids, again=True)
            finish(sequence, reason)
        self._drop_finished(ended)
        self._torn = False
        return ended

    def _drop_finished(self, sequences: list[Sequence]) -> None:
        """Frees what the finished ones of `sequences` hold, and forgets finished requests.

        When none is left, nobody waits for what is in flight.
        """
        finished = [sequence for sequence in sequences if sequence.finished]
        self._planner.drop(finished)
        for sequence in finished:
            if sequence.request.finished:
                self.requests.pop(sequence.request.request_id, None)
        if not self.requests:
            self._in_flight.clear()
