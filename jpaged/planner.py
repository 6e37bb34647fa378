"""Who runs, in which row and which blocks, and what a step does for each."""

import bisect
import operator

from jpaged.admission import Admission
from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.draft import Draft
from jpaged.plan import PoolUse, ScheduledRow, StepPlan
from jpaged.prefix_cache import PrefixCache
from jpaged.requests import Sequence
from jpaged.sharing import Hit, register_filled
from jpaged.swapping import NOTHING_STORED, Swapping
from jpaged.tables import grow, num_filled_slots, num_new_blocks, own_tail
from jpaged.waiting import WaitingQueue

_order = operator.attrgetter("order")


class Planner:
    """Hands out rows, blocks and, step by step, a budget of tokens.

    Of these every running sequence gets one, then prompts that are running what they need, then
    waiting sequences. Running and waiting ones are each in their order (`Sequence.order`);
    `Admission` says who of the waiting is next.

    Of one priority at most one running sequence is in the middle of its prompt: it took what was
    left of the budget, so none was admitted after it but those of a better priority, which are
    planned before it. A step plans the running in order and preempts from their end: whoever is
    planned is safe, the first always gets on, and no two can ever preempt each other in turn.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, PrefixCache())
        self.free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self.swapping = Swapping(config.num_swap_blocks)
        self._admission = Admission(config, self.pool, self.waiting)

    def plan(self) -> StepPlan | None:
        """The next step, and all that it takes given out; somebody runs or waits.

        None, and nothing changed, where all that run end with the tokens in flight.
        """
        draft = Draft(self.config.max_num_batched_tokens)
        self._continue_running(draft)
        self._admit_waiting(draft)
        if not draft.rows:
            if any(sequence.num_in_flight for sequence in self.running):
                return None
            self._admit_beam(draft)
        assert draft.rows, "the first sequence can always run: it fits the pool alone"
        return draft.plan(self._pool_use(draft))

    def can_plan_beyond(self, plan: StepPlan) -> bool:
        """Whether the step after `plan` can be planned before its tokens are known.

        Not if what some sequence may do next depends on them, and not where somebody would be
        preempted: those whom these tokens end may leave blocks enough.
        """
        if plan.is_awaited:
            return False
        most = 2 * len(self.running) + self.config.max_num_batched_tokens // self.config.block_size
        return most <= self.pool.num_free or self._num_wanted <= self.pool.num_free

    def take_in_block(self, sequence: Sequence) -> None:
        """Makes known the block that the newest token fills, if a step in flight writes it."""
        end = sequence.num_tokens
        if sequence.num_computed_tokens == end:
            self._register(sequence, end - 1, end)

    def drop(self, finished: list[Sequence]) -> None:
        """Frees what ended sequences hold, and their places."""
        for sequence in finished:
            if sequence.row is None:
                self.waiting.remove(sequence)
                self.swapping.take(sequence)
            else:
                self._release(sequence)
        if finished:
            self.running = [sequence for sequence in self.running if not sequence.finished]

    @property
    def num_tokens_held(self) -> int:
        """Tokens whose K/V are in the pool for a running sequence, shared ones counted once."""
        tables = [(s.block_ids, s.num_computed_tokens) for s in self.running]
        return num_filled_slots(self.pool, tables, self.config.block_size)

    def _continue_running(self, draft: Draft) -> None:
        """Gives every running sequence a token, and prompts as many as are left, in order."""
        pool, size = self.pool, self.config.block_size
        for sequence in list(self.running):
            if sequence.row is None:  # preempted just now
                continue
            start = sequence.num_computed_tokens
            num_tokens = sequence.num_all_tokens - start
            if not num_tokens or sequence.ends_in_flight:
                continue  # a beam that waits for others, or one that ends with what is in flight
            if num_tokens > 1:
                self._admit_waiting(draft, before=sequence)
                num_tokens = min(num_tokens, 1 + self._num_spare(draft))
            end = start + num_tokens
            columns = []
            # Of sixteen decodes, one needs a block.
            if num_new_blocks(pool, sequence, end, self.config):
                self._make_room(sequence, end, draft)
                if sequence.row is None:
                    continue
                columns = own_tail(pool, sequence, size, draft.copies)
                columns += grow(pool, sequence, end, self.config)
            draft.add(sequence, num_tokens, columns)
            if start // size < end // size:
                self._register(sequence, start, end)

    @property
    def _num_wanted(self) -> int:
        """Blocks that the running sequences want in the next step, and at most."""
        pool, config, count = self.pool, self.config, 0
        for sequence in self.running:
            start, num_all = sequence.num_computed_tokens, sequence.num_all_tokens
            if start < num_all and not sequence.ends_in_flight:
                end = min(num_all, start + config.max_num_batched_tokens)
                count += num_new_blocks(pool, sequence, end, config)
        return count

    def _num_spare(self, draft: Draft) -> int:
        """Tokens of the budget that are left when every running sequence has had one."""
        return draft.num_left - (len(self.running) - len(draft.rows))

    def _make_room(self, sequence: Sequence, end: int, draft: Draft) -> None:
        """Preempts until there are blocks for the tokens before `end`, or the sequence is gone."""
        # Asked anew each time: whoever gave up may have been the last to share the block that is
        # written next.
        while sequence.row is not None and (
            num_new_blocks(self.pool, sequence, end, self.config) > self.pool.num_free
        ):
            self._preempt_last(draft)

    def _preempt_last(self, draft: Draft) -> None:
        """Sends the last in order back to the queue; what has no room elsewhere is lost."""
        sequence = self.running.pop()
        draft.preempted.append(sequence)
        draft.swap_outs += self.swapping.store(sequence)
        self._release(sequence)
        self.waiting.add(sequence)

    def _admit_waiting(self, draft: Draft, *, before: Sequence | None = None) -> None:
        """Starts waiting sequences while there is room for all their known tokens.

        With `before`, only those of a better priority than that running one, which is planned next.
        """
        if draft.preempted:
            return
        self._fork_waiting(draft)
        while self.waiting and len(self.running) < self.config.max_running:
            if before is not None and self.waiting.best_priority >= before.request.priority:
                return
            num_free = self._num_free_to_start
            if num_free < 1 or self._num_spare(draft) < 1:
                return
            found = self._admission.next(num_free)
            if found is None:
                return
            self._start(*found, draft)
            self._fork_waiting(draft)

    def _admit_beam(self, draft: Draft) -> None:
        """Starts a sequence when all that run are beams, which wait for some that found no room.

        The last of those that run make room for it. The beams of the first search in order are
        waited for by themselves alone, and fit the pool when they share their prompt: so they all
        get their turn. Where they do not share all of it, since one of them computed it at the same
        time as somebody else did, they start over, from the blocks that the cache then knows.
        """
        while len(self.running) == self.config.max_running or (
            (found := self._admission.next(self.pool.num_free)) is None
        ):
            are_of_one_search = self.running[0].request is self.running[-1].request
            for _ in range(len(self.running) if are_of_one_search else 1):
                self._preempt_last(draft)
        self._start(*found, draft)

    @property
    def _num_free_to_start(self) -> int:
        """Free blocks but for one for each running sequence, which wants it soon.

        It would get it by preempting whoever had started in it. On ShareGPT lengths keeping it
        back saves two preemptions in three.
        """
        return self.pool.num_free - len(self.running)

    def _start(self, sequence: Sequence, hit: Hit, draft: Draft) -> None:
        """Gives a waiting sequence a row, what is known of its prefix, and its first tokens."""
        size, stored = self.config.block_size, self.swapping.take(sequence)
        if sequence in draft.preempted:  # what leaves in this step is not there yet
            stored = NOTHING_STORED
        # The last token is computed in any case: its logits are wanted.
        num_stored = min(stored.num_tokens, sequence.num_tokens - 1)
        if num_stored > hit.num_tokens:
            hit = hit.without_copy(size)
        start = max(num_stored, hit.num_tokens)
        num_tokens = min(sequence.num_tokens - start, self._num_spare(draft))
        self.waiting.start(sequence)
        self._give_row(sequence)
        self.pool.share(hit.all_ids)  # the block to be copied too, lest it be given out
        sequence.block_ids = list(hit.block_ids)
        sequence.num_computed_tokens = start
        grow(self.pool, sequence, start + num_tokens, self.config)
        if hit.copied_id is not None:
            draft.copies.append((hit.copied_id, sequence.block_ids[len(hit.block_ids)]))
            self.pool.free([hit.copied_id])
        if start > hit.num_tokens:
            columns = range(len(hit.block_ids), self.config.blocks_for(start))
            draft.swap_ins += [(stored.space_ids[c], sequence.block_ids[c]) for c in columns]
        draft.add(sequence, num_tokens, list(enumerate(sequence.block_ids)), is_new=True)
        self._register(sequence, hit.num_tokens, start + num_tokens)
        draft.num_hit += hit.num_tokens
        draft.num_queried += sequence.num_tokens

    def _fork_waiting(self, draft: Draft) -> None:
        """Starts what waits for a prompt that ends in this step, with no token of its own."""
        leads, draft.leads = draft.leads, []
        for lead in leads:
            for sequence in lead.sequence.request.sequences:
                if len(self.running) >= self.config.max_running or self._num_free_to_start < 0:
                    return
                is_waiting = sequence.row is None and not sequence.finished
                if is_waiting and sequence.num_all_tokens == sequence.num_prompt_tokens:
                    self._fork(sequence, lead, draft)

    def _fork(self, sequence: Sequence, lead: ScheduledRow, draft: Draft) -> None:
        """Lets a sequence begin with all that the first of its request has, a half full block too.

        Whoever writes that block first while it is shared gets a copy (`own_tail`).
        """
        self.waiting.remove(sequence)
        self.swapping.take(sequence)
        self._give_row(sequence)
        sequence.block_ids = list(lead.sequence.block_ids)
        self.pool.share(sequence.block_ids)
        draft.fork(sequence, lead)

    def _give_row(self, sequence: Sequence) -> None:
        bisect.insort(self.running, sequence, key=_order)
        sequence.row = self.free_rows.pop()

    def _register(self, sequence: Sequence, start: int, end: int) -> None:
        """Makes known the blocks that the tokens `start` to `end - 1` fill, if these are known."""
        if self.config.enable_prefix_caching:
            end = min(end, sequence.num_tokens)
            register_filled(self.pool.cache, sequence, start, end, self.config.block_size)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "only a running sequence holds anything"
        self.pool.free(sequence.block_ids)
        self.free_rows.append(sequence.row)
        sequence.forget_device()

    def _pool_use(self, draft: Draft) -> PoolUse:
        tables = [(row.sequence.block_ids, row.seq_len) for row in draft.rows]
        if len(tables) < len(self.running):
            planned = {row.sequence for row in draft.rows}
            rest = [s for s in self.running if s not in planned]
            tables += [(s.block_ids, s.num_computed_tokens) for s in rest]
        return PoolUse(
            num_tokens=num_filled_slots(self.pool, tables, self.config.block_size),
            num_blocks=self.pool.num_used,
            num_entries=sum(len(block_ids) for block_ids, _ in tables),
            num_cached=self.pool.num_cached,
        )
