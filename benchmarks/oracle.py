"""A device that remembers histories: what every sequence sees through its table, checked.

Each slot of the pool holds a number that stands for a whole history of tokens, so a block that was
freed too early, shared wrongly, not copied or copied too late shows at once.
"""

from collections.abc import Iterable
from typing import Any

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
        self.tables = np.zeros((config.max_num_seqs, config.max_blocks_per_seq), np.int64)
        self._histories: dict[Sequence, tuple[list[int], list[int]]] = {}  # tokens, numbers

    def run(self, plan: StepPlan) -> None:
        """Does what a step does, and checks what each row sees before and after it."""
        self.move(plan)
        for row in plan.rows:
            for column, block in row.new_blocks:
                self.tables[row.row, column] = block
        written = {block for row in plan.rows for block in self.blocks(row)[row.start :]}
        for row in plan.rows:
            # What another row of this step writes is there when attention reads it, not before.
            before = [p for p, block in enumerate(self.blocks(row)) if block not in written]
            self.assert_sees(row, np.array(before, np.int64))
        for row in plan.rows:
            self.write(row)
        for row in plan.rows:
            self.assert_sees(row, np.arange(row.seq_len))

    def blocks(self, row: ScheduledRow) -> list[int]:
        """The block of each position that the row sees."""
        return self.tables[row.row, np.arange(row.seq_len) // self.block_size].tolist()

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
        self.pool[blocks, positions % self.block_size] = self.history(row.sequence)[positions]

    def assert_sees(self, row: ScheduledRow, positions: np.ndarray) -> None:
        """Fails unless the row's table shows its own history at `positions`."""
        blocks = self.tables[row.row, positions // self.block_size]
        seen = self.pool[blocks, positions % self.block_size]
        wrong = np.flatnonzero(seen != self.history(row.sequence)[positions])
        assert not len(wrong), f"row {row.row} sees another history at {positions[wrong]}"

    def history(self, sequence: Sequence) -> np.ndarray:
        """A number for each prefix of the sequence's tokens."""
        tokens, known = self._histories.setdefault(sequence, ([], []))
        if sequence.token_ids[: len(tokens)] != tokens:  # another beam has taken its place
            del tokens[:], known[:]
        salt = hash(sequence.request.params.cache_salt)
        for token in sequence.token_ids[len(known) :]:
            tokens.append(token)
            known.append(hash((known[-1] if known else salt, token)))
        return np.array(known, np.int64)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Drops what is remembered of sequences that have ended."""
        for sequence in sequences:
            self._histories.pop(sequence, None)


def _copy(source: np.ndarray, destination: np.ndarray, pairs: Iterable[tuple[int, int]]) -> None:
    read, written = [i for i, _ in pairs], [i for _, i in pairs]
    destination[written] = source[read]


class WatchedScheduler(Scheduler):
    """A scheduler whose every committed plan the oracle has run."""

    def __init__(self, config: EngineConfig, **options: object) -> None:
        super().__init__(config, **options)  # pyright: ignore[reportArgumentType]
        self.oracle = Oracle(config)

    def commit(self, plan: StepPlan, *args: Any, **options: Any) -> list[Sequence]:
        """As a scheduler does, once the oracle has run the plan."""
        self.oracle.run(plan)
        return super().commit(plan, *args, **options)
