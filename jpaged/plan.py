"""What one step will do, decided before it runs."""

import dataclasses
from typing import NamedTuple

from jpaged.requests import Sequence


class ScheduledRow(NamedTuple):
    """One sequence's part of a step: its tokens `start` to `start + num_tokens - 1`.

    `samples` says that the step reaches the last known token, so that its logits pick the next.
    `new_blocks` are the (column, block id) pairs that the device's table lacks. `is_new` rows were
    assigned in this step: the device needs their seeds and parameters. A row that `feeds_back`
    has one token, the one that the device sampled last on this row. A row that is `forked` has no
    token of its own: it samples from the last logits of that row of the same request.
    """

    sequence: Sequence
    row: int
    start: int
    num_tokens: int
    samples: bool
    new_blocks: tuple[tuple[int, int], ...]
    is_new: bool
    feeds_back: bool
    forked: int | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence whose K/V are in the pool after the step."""
        return self.start + self.num_tokens


class PoolUse(NamedTuple):
    """What the pool holds when a planned step is done and nothing is freed yet."""

    num_tokens: int = 0  # whose K/V a sequence's table shows, shared ones counted once
    num_blocks: int = 0  # that hold them
    num_entries: int = 0  # of all tables
    num_cached: int = 0  # free blocks that could still be shared


NOTHING_USED = PoolUse()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step: the rows with one token first (`num_decodes` of them), longer chunks, then forks.

    Before the step writes anything, `swap_outs`, (block, host block) pairs, are read; then all
    sources of `copies`, (source, destination) blocks, and then their destinations written; then
    `swap_ins`, (host block, block) pairs, of blocks that earlier steps left there. `preempted`
    sequences lost their row and blocks while the step was planned. Of those that start, the prefix
    cache was asked for `num_queried` tokens and had `num_hit`. Where it `is_awaited`, the next step
    cannot be planned before this one's tokens are known.
    """

    rows: tuple[ScheduledRow, ...]
    num_tokens: int
    num_decodes: int
    copies: tuple[tuple[int, int], ...]
    preempted: tuple[Sequence, ...]
    swap_outs: tuple[tuple[int, int], ...] = ()
    swap_ins: tuple[tuple[int, int], ...] = ()
    num_queried: int = 0
    num_hit: int = 0
    is_awaited: bool = False
    use: PoolUse = NOTHING_USED

    @property
    def num_prefills(self) -> int:
        """Rows with more than one token."""
        return sum(row.num_tokens > 1 for row in self.rows[self.num_decodes :])
