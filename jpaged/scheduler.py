"""Which sequences run in the next step, with how many tokens, in which blocks."""

import collections
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.draft import Draft
from jpaged.errors import QueueFullError
from jpaged.finish import finish, settle
from jpaged.outputs import Logprob
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.prefix_cache import PrefixCache
from jpaged.requests import FinishReason, Request, Sequence
from jpaged.sharing import NOTHING, Hit, find_prefix, register_filled
from jpaged.stats import Counters


class Scheduler:
    """Continuous batching over a pool of blocks, first come first served.

    Each step hands out a budget of tokens: to running decodes, then to running prefills, then to
    waiting sequences. `schedule` plans a step, the caller runs it, `commit` takes in its tokens.

    Running sequences are in order of arrival and stand before all waiting ones. Only the latest of
    them can be in the middle of its prompt: it took what was left of the budget, so none was
    admitted after it. The latest is also the one to be preempted, so it is never in the plan yet.

    An exception may leave everything but `requests` half changed; `recover` rebuilds the rest.
    """

    def __init__(self, config: EngineConfig, *, eos_token_ids: Iterable[int] = ()) -> None:
        self.config = config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: dict[str, Request] = {}
        self.counters = Counters()
        self._num_arrivals = 0
        self._start_over()
        self._torn = False

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.requests)

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
        return self._num_held([(s.block_ids, s.num_computed_tokens) for s in self.running])

    def add(self, request: Request) -> None:
        """Queues each sequence of `request`, or raises and changes nothing."""
        self._mend()
        self.validate(request)
        room = self.config.max_num_waiting - len(self.waiting)
        if len(request.sequences) > room:
            raise QueueFullError(
                f"the queue holds {len(self.waiting)} sequences and has room for {room}, "
                f"got {len(request.sequences)}; wait for some to finish or raise max_num_waiting"
            )
        self._torn = True
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.update(dict.fromkeys(request.sequences))
        self.counters.prompt_tokens += len(request.prompt_token_ids)
        self.requests[request.request_id] = request  # last: from here on the request is ours
        self._torn = False

    def validate(self, request: Request) -> None:
        """Raises ValueError for a request that could never run to its end."""
        config, max_tokens = self.config, request.params.max_tokens
        num_prompt = len(request.prompt_token_ids)
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by a running request")
        if num_prompt == 0:
            raise ValueError("the prompt must have at least one token, got none")
        if num_prompt >= config.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_model_len is {config.max_model_len}, "
                "which must leave room for one more; shorten the prompt or raise max_model_len"
            )
        longest = config.max_model_len
        if max_tokens is not None:
            longest = min(num_prompt + max_tokens, longest)
        num_needed, num_there = config.blocks_for(longest), config.num_blocks - 1
        if num_needed > num_there:
            raise ValueError(
                f"{num_prompt} prompt tokens and max_tokens={max_tokens} may need {num_needed} "
                f"blocks of {config.block_size} tokens and the pool has {num_there}, so the "
                "request can never fit; lower max_tokens or raise num_blocks"
            )

    def schedule(self) -> StepPlan | None:
        """Plans the next step, or returns None when there is nothing to do."""
        self._mend()
        assert self._plan is None, "a plan is either committed or given up by recover()"
        if not self.running and not self.waiting:
            return None
        self._torn = True
        draft = Draft(self.config.max_num_batched_tokens)
        self._continue_running(draft)
        if not draft.preempted:
            self._admit_waiting(draft)
        self._plan = plan = draft.plan()
        assert plan.rows, "the earliest sequence can always run: it fits the pool alone"
        self._count_held(plan)
        self._torn = False
        return plan

    def commit(
        self,
        plan: StepPlan,
        token_ids: SequenceOf[int],
        logprobs: SequenceOf[dict[int, Logprob] | None] | None = None,
    ) -> list[Sequence]:
        """Takes in what the step sampled; the sequences that got a token.

        `token_ids` and `logprobs` have one entry for each row of the plan, ignored where the row
        does not sample. Sequences that were aborted since are passed over.
        """
        assert plan is self._plan, "only the plan scheduled last can be committed, and only once"
        assert not self._torn, "an abort was cut short since: recover() comes first"
        num_rows = len(plan.rows)
        if len(token_ids) != num_rows or (logprobs is not None and len(logprobs) != num_rows):
            raise ValueError(f"the plan has {num_rows} rows, got {len(token_ids)} token ids")
        self._torn = True
        changed = []
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            if sequence.finished:
                continue
            sequence.num_computed_tokens = row.seq_len
            if row.samples:
                self._take(sequence, int(token_ids[index]), logprobs[index] if logprobs else None)
                changed.append(sequence)
        self.pool.cache.settle()
        self._drop_finished(changed)
        self.counters.steps += 1
        self._plan = None
        self._torn = False
        return changed

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing done, while sequences hold blocks."""
        self._mend()
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
        """Rebuilds everything from `requests` after an exception; the sequences found finished.

        All that is unfinished waits again, in order of arrival, with nothing computed. A token
        that was taken in is kept, and checked in case the exception came before its check.
        """
        self._torn = True
        self._start_over()
        found = []
        for request in list(self.requests.values()):
            for sequence in request.sequences:
                sequence.forget_device()
                if not sequence.finished:
                    settle(sequence, self.config.max_model_len, self.eos_token_ids, again=True)
                if sequence.finished:
                    found.append(sequence)
                else:
                    self.waiting[sequence] = None
            if request.finished:
                del self.requests[request.request_id]
        self.counters.recoveries += 1
        self._torn = False
        return found

    def _start_over(self) -> None:
        """Makes all that is held free, and both queues empty."""
        self._plan: StepPlan | None = None
        self.pool = BlockPool(self.config.num_blocks, PrefixCache())
        self.free_rows = list(range(self.config.max_num_seqs - 1, -1, -1))
        self.running: list[Sequence] = []
        # Ordered, so that an aborted sequence leaves the middle of a long queue at no cost.
        self.waiting: collections.OrderedDict[Sequence, None] = collections.OrderedDict()

    def _mend(self) -> None:
        """Recovers if the last call here was cut short and its caller did not."""
        if self._torn:
            self.recover()

    def _continue_running(self, draft: Draft) -> None:
        """Gives every running sequence a token, and the latest one as many as it has left."""
        for sequence in list(self.running):
            if sequence.row is None:  # preempted just now
                continue
            start = sequence.num_computed_tokens
            num_tokens = min(sequence.num_tokens - start, draft.num_left)
            end = start + num_tokens
            columns = []
            if self._num_new_blocks(sequence, end):  # of sixteen decodes, one needs a block
                self._make_room(sequence, end, draft)
                if sequence.row is None:
                    continue
                columns = self._own_tail(sequence, draft) + self._grow(sequence, end)
            draft.add(sequence, num_tokens, columns)
            self._register(sequence, start, end)

    def _make_room(self, sequence: Sequence, end: int, draft: Draft) -> None:
        """Preempts until there are blocks for the tokens before `end`, or the sequence is gone."""
        # Asked anew each time: whoever gave up may have been the last to share the block that is
        # written next.
        while sequence.row is not None and self._num_new_blocks(sequence, end) > self.pool.num_free:
            self._preempt_latest(draft)

    def _admit_waiting(self, draft: Draft) -> None:
        """Starts waiting sequences in order, while all their known tokens have free blocks."""
        most = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        while self.waiting and len(self.running) < most:
            sequence = next(iter(self.waiting))
            # Every running sequence wants its next block soon, and would get it by preempting the
            # one just admitted. On ShareGPT lengths this saves two preemptions in three.
            num_free = self.pool.num_free - len(self.running)
            lead = draft.fork_of(sequence)
            if lead is not None and num_free >= 0:
                self._fork(sequence, lead, draft)
                continue
            hit = self._find_prefix(sequence)
            if hit.copied_id is not None and self._num_taken(sequence, hit) > num_free:
                hit = hit.without_copy(self.config.block_size)
            if not draft.num_left or self._num_taken(sequence, hit) > num_free:
                return
            self._start(sequence, hit, draft)

    def _num_taken(self, sequence: Sequence, hit: Hit) -> int:
        """Free blocks that are so no more when the sequence starts, if only to be copied."""
        num_new = self.config.blocks_for(sequence.num_tokens) - len(hit.block_ids)
        return num_new + self.pool.num_free_among(hit.all_ids)

    def _start(self, sequence: Sequence, hit: Hit, draft: Draft) -> None:
        """Gives a waiting sequence a row, what is known of its prefix, and its first tokens."""
        num_tokens = min(sequence.num_tokens - hit.num_tokens, draft.num_left)
        self._give_row(sequence)
        self.pool.share(hit.all_ids)  # the block to be copied too, lest it be given out
        sequence.block_ids = list(hit.block_ids)
        sequence.num_computed_tokens = hit.num_tokens
        self._grow(sequence, hit.num_tokens + num_tokens)
        if hit.copied_id is not None:
            draft.copies.append((hit.copied_id, sequence.block_ids[len(hit.block_ids)]))
            self.pool.free([hit.copied_id])
        draft.add(sequence, num_tokens, list(enumerate(sequence.block_ids)), is_new=True)
        self._register(sequence, hit.num_tokens, hit.num_tokens + num_tokens)
        self.counters.hit_tokens += hit.num_tokens
        self.counters.queried_tokens += sequence.num_tokens

    def _fork(self, sequence: Sequence, lead: ScheduledRow, draft: Draft) -> None:
        """Lets a sequence begin with all that the first of its request has, a half full block too.

        Whoever writes that block first while it is shared gets a copy (`_own_tail`).
        """
        self._give_row(sequence)
        sequence.block_ids = list(lead.sequence.block_ids)
        self.pool.share(sequence.block_ids)
        draft.fork(sequence, lead)

    def _give_row(self, sequence: Sequence) -> None:
        del self.waiting[sequence]
        self.running.append(sequence)
        sequence.row = self.free_rows.pop()

    def _num_new_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to allocate before the sequence can write up to `num_tokens`."""
        grown = self.config.blocks_for(num_tokens) - len(sequence.block_ids)
        return grown + self._shares_tail(sequence)

    def _shares_tail(self, sequence: Sequence) -> bool:
        """Whether the block that the sequence writes next is half full and somebody else's too."""
        return (
            sequence.num_computed_tokens % self.config.block_size > 0
            and self.pool.ref_counts[sequence.block_ids[-1]] > 1
        )

    def _own_tail(self, sequence: Sequence, draft: Draft) -> list[tuple[int, int]]:
        """Replaces a shared tail by a copy: the (column, block) that the device must learn."""
        if not self._shares_tail(sequence):
            return []
        (block_id,) = self.pool.allocate(1)
        draft.copies.append((sequence.block_ids[-1], block_id))
        self.pool.free(sequence.block_ids[-1:])
        sequence.block_ids[-1] = block_id
        return [(len(sequence.block_ids) - 1, block_id)]

    def _grow(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]]:
        """Allocates what `num_tokens` tokens need: the (column, block) pairs that are new."""
        num_held = len(sequence.block_ids)
        new_ids = self.pool.allocate(self.config.blocks_for(num_tokens) - num_held)
        sequence.block_ids += new_ids
        return list(enumerate(new_ids, num_held))

    def _find_prefix(self, sequence: Sequence) -> Hit:
        if not self.config.enable_prefix_caching:
            return NOTHING
        return find_prefix(self.pool.cache, sequence, self.config.block_size)

    def _register(self, sequence: Sequence, start: int, end: int) -> None:
        size = self.config.block_size
        if self.config.enable_prefix_caching and start // size < end // size:
            register_filled(self.pool.cache, sequence, start, end, size)

    def _preempt_latest(self, draft: Draft) -> None:
        """Sends the latest arrival back to the head of the queue, to be computed again."""
        sequence = self.running.pop()
        draft.preempted.append(sequence)
        self._release(sequence)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.counters.preemptions += 1

    def _count_held(self, plan: StepPlan) -> None:
        tables = [(row.sequence.block_ids, row.seq_len) for row in plan.rows]
        size, held = self.config.block_size, self._num_held(tables)
        self.counters.add_step(plan, self.pool, tokens_held=held, block_size=size)

    def _num_held(self, tables: list[tuple[list[int], int]]) -> int:
        """Filled slots of the blocks in use: only a table's last block may have empty ones."""
        size = self.config.block_size
        empty = {ids[-1]: -num_tokens % size for ids, num_tokens in tables if ids}
        return self.pool.num_used * size - sum(empty.values())

    def _take(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        if logprobs is not None:  # before the token, which is what makes both count
            sequence.logprobs.append(logprobs)
            sequence.cumulative_logprob += logprobs[token].logprob
        sequence.token_ids.append(token)
        sequence.last_token_on_device = True
        self.counters.generated_tokens += 1
        settle(sequence, self.config.max_model_len, self.eos_token_ids)

    def _end(self, requests: list[Request], reason: FinishReason) -> list[Sequence]:
        self._mend()
        self._torn = True
        ended = [s for request in requests for s in request.sequences if not s.finished]
        for sequence in ended:
            finish(sequence, reason)
        self._drop_finished(ended)
        self._torn = False
        return ended

    def _drop_finished(self, sequences: list[Sequence]) -> None:
        """Frees what the finished ones of `sequences` hold, and forgets finished requests."""
        finished = [sequence for sequence in sequences if sequence.finished]
        for sequence in finished:
            if sequence.row is None:
                self.waiting.pop(sequence, None)
            else:
                self._release(sequence)
            if sequence.request.finished:
                self.requests.pop(sequence.request.request_id, None)
        if finished:
            self.running = [sequence for sequence in self.running if not sequence.finished]

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "only a running sequence holds anything"
        self.pool.free(sequence.block_ids)
        self.free_rows.append(sequence.row)
        sequence.forget_device()
