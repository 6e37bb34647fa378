"""A device that remembers histories: what every sequence sees through its table, checked.

Each slot of the pool holds a number that stands for a whole history of tokens, so a block that was
freed too early, shared wrongly, not copied or copied too late shows at once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jpaged.config import EngineConfig
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.requests import Sequence
from jpaged.scheduler import Scheduler


class Oracle:
    """Pool and tables as the runner keeps them, in NumPy, with histories in place of K and V."""

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.block_size
        self.pool = np.zeros((config.num_blocks, config.block_size), np.int64)
        self.space = np.zeros((config.num_swap_blocks, config.block_size), np.int64)
        self.slots = np.arange(self.pool.size).reshape(self.pool.shape)
        self.tables = np.zeros((config.max_num_seqs, config.max_blocks_per_seq), np.int64)
        self._histories: dict[Sequence, tuple[list[int], list[int]]] = {}  # tokens, numbers

    def run(self, plan: StepPlan, running: Iterable[Sequence]) -> None:
        """Does what a step does, and checks three times what each of the `running` sees.

        Before blocks move, what is to be copied lies in the block that it is copied from, and what
        comes back from host memory is nowhere in the pool; then both are where the tables say.
        What another row of this step writes is seen when attention reads it, not before.
        """
        for row in plan.rows:
            for column, block in row.new_blocks:
                self.tables[row.row, column] = block
        planned = {row.sequence for row in plan.rows}
        paused = [
            _View(sequence.row, sequence, sequence.num_computed_tokens)
            for sequence in running  # of which some may have started in a later plan
            if sequence.row is not None and sequence.candidates is not None
            if sequence not in planned
        ]
        before = [*(_View(row.row, row.sequence, row.start) for row in plan.rows), *paused]
        after = [*(_View(row.row, row.sequence, row.seq_len) for row in plan.rows), *paused]
        self.assert_sees(before, self.origins(plan), hidden=self.written(plan, plan.swap_ins))
        self.move(plan)
        self.assert_sees(before, self.slots, hidden=self.written(plan, ()))
        for row in plan.rows:
            self.write(row)
        self.assert_sees(after, self.slots, hidden=np.zeros(self.slots.size, bool))

    def origins(self, plan: StepPlan) -> np.ndarray:
        """Where the contents of each slot are before anything is copied."""
        origins = self.slots.copy()
        sources, destinations = _columns(plan.copies)
        origins[destinations] = self.slots[sources]
        return origins

    def written(self, plan: StepPlan, swap_ins: Iterable[tuple[int, int]]) -> np.ndarray:
        """Whether each slot gets its contents from a row of the plan, or by one of `swap_ins`."""
        written = np.zeros(self.slots.shape, bool)
        _, returning = _columns(swap_ins)
        written[returning] = True
        for row in plan.rows:
            positions = np.arange(row.start, row.seq_len)
            blocks = self.tables[row.row, positions // self.block_size]
            written[blocks, positions % self.block_size] = True
        return written.reshape(-1)

    def move(self, plan: StepPlan) -> None:
        """Swaps out, copies and swaps in; each reads all its sources before it writes."""
        returning = self.space[[source for source, _ in plan.swap_ins]]
        _copy(self.pool, self.space, plan.swap_outs)
        _copy(self.pool, self.pool, plan.copies)
        self.pool[[destination for _, destination in plan.swap_ins]] = returning

    def write(self, row: ScheduledRow) -> None:
        """Puts the histories of the row's tokens into their slots."""
        positions = np.arange(row.start, row.seq_len)
        blocks = self.tables[row.row, positions // self.block_size]
        assert (blocks > 0).all(), f"row {row.row} writes to the null block"
        history = self.history(row.sequence, row.seq_len)
        self.pool[blocks, positions % self.block_size] = history[positions]

    def assert_sees(self, views: "list[_View]", origins: np.ndarray, *, hidden: np.ndarray) -> None:
        """Fails unless every table shows its sequence's own history, but in `hidden` slots.

        Of each slot the contents are those of the slot in `origins`.
        """
        for row, sequence, num_tokens in views:
            positions = np.arange(num_tokens)
            place = self.tables[row, positions // self.block_size], positions % self.block_size
            history = self.history(sequence, num_tokens)[:num_tokens]
            wrong = self.pool.reshape(-1)[origins[place]] != history
            wrong &= ~hidden[self.slots[place]]
            assert not wrong.any(), f"row {row} sees another history at {positions[wrong]}"

    def history(self, sequence: Sequence, num_tokens: int) -> np.ndarray:
        """A number for each prefix of the sequence's tokens, of which there are at least so many.

        What was sampled for one that had ended by then nobody knows, nor should see.
        """
        tokens, known = self._histories.setdefault(sequence, ([], []))
        if sequence.token_ids[: len(tokens)] != tokens:  # another beam has taken its place
            del tokens[:], known[:]
        salt = hash(sequence.request.params.cache_salt)
        for token in sequence.token_ids[len(known) :]:
            tokens.append(token)
            known.append(hash((known[-1] if known else salt, token)))
        num_unknown = num_tokens - len(known)
        assert num_unknown <= 0 or sequence.finished, "a live sequence's tokens are known"
        unknown = [hash((id(sequence), place)) for place in range(num_unknown)]
        return np.array(known + unknown, np.int64)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Drops what is remembered of sequences that have ended."""
        for sequence in sequences:
            self._histories.pop(sequence, None)


class _View(NamedTuple):
    """A sequence's first tokens, as the table of its row shows them."""

    row: int
    sequence: Sequence
    num_tokens: int


def _copy(source: np.ndarray, destination: np.ndarray, pairs: Iterable[tuple[int, int]]) -> None:
    read, written = _columns(pairs)
    destination[written] = source[read]


def _columns(pairs: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Where each of the pairs comes from, and where it goes."""
    return [i for i, _ in pairs], [i for _, i in pairs]


class WatchedScheduler(Scheduler):
    """A scheduler whose plans the oracle runs in order, as a device does what it was sent.

    That is when their tokens are taken in; of those that nobody waits for any more, before the next
    is planned.
    """

    def __init__(self, config: EngineConfig, **options: object) -> None:
        super().__init__(config, **options)  # pyright: ignore[reportArgumentType]
        self.oracle = Oracle(config)
        self._sent: list[StepPlan] = []

    def schedule(self) -> StepPlan | None:
        """As a scheduler does."""
        self.mend()
        while self._sent and self._sent[0] not in self.in_flight:
            self.oracle.run(self._sent.pop(0), self.running)
        plan = super().schedule()
        if plan is not None:
            self._sent.append(plan)
        return plan

    def commit(self, plan: StepPlan, *args: Any, **options: Any) -> list[Sequence]:
        """As a scheduler does, once the oracle has run the plan."""
        if plan in self._sent:
            self._sent.remove(plan)
            self.oracle.run(plan, self.running)
        return super().commit(plan, *args, **options)

    def recover(self) -> list[Sequence]:
        """As a scheduler does: what was sent may be lost, and counts for nothing."""
        self._sent = []
        return super().recover()
