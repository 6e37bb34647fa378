"""What the pool of blocks and the block tables hold at one moment, as plain data."""

import collections
import dataclasses
import enum
from typing import NamedTuple

from jpaged.blocks import NULL_BLOCK
from jpaged.requests import Sequence
from jpaged.scheduler import Scheduler
from jpaged.stats import missing


class BlockKind(enum.Enum):
    """What a block is good for now."""

    NULL = "null"  # padding's own
    FREE = "free"  # holds nothing
    CACHED = "cached"  # free, and what it holds can be shared until it is given out
    USED = "used"  # in a running sequence's table


class BlockState(NamedTuple):
    """One block: `owners` are the places in `Snapshot.tables` of the sequences that hold it."""

    block_id: int
    kind: BlockKind
    num_tokens: int
    ref_count: int
    owners: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """One running sequence and its block table; `num_computed_tokens` are held in those blocks.

    `text` is what was generated, as far as it is settled; `row` is the sequence's for as long as
    it runs, so it can tell sequences apart from one snapshot to the next.
    """

    request_id: str
    index: int
    num_siblings: int  # sequences of the request, itself counted
    row: int
    prompt: str | None
    text: str
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    block_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The pool block by block, and the tables in order; later steps change nothing."""

    block_size: int
    blocks: tuple[BlockState, ...]
    tables: tuple[TableState, ...]
    num_waiting: int

    def count(self, kind: BlockKind) -> int:
        """Blocks of that kind."""
        return sum(block.kind is kind for block in self.blocks)

    @property
    def num_shared(self) -> int:
        """Blocks in more than one table."""
        return sum(block.ref_count > 1 for block in self.blocks)

    @property
    def tokens_held(self) -> int:
        """Tokens in used blocks, shared ones counted once."""
        return sum(block.num_tokens for block in self.blocks if block.kind is BlockKind.USED)

    @property
    def waste(self) -> float:
        """The share of slots in used blocks that hold no token."""
        return missing(self.tokens_held, self.count(BlockKind.USED) * self.block_size)

    @property
    def saving(self) -> float:
        """The share of blocks in the tables that sharing saves."""
        num_entries = sum(len(table.block_ids) for table in self.tables)
        return missing(self.count(BlockKind.USED), num_entries)


def take_snapshot(scheduler: Scheduler) -> Snapshot:
    """The scheduler's pool and tables, as the steps that are planned leave them."""
    tables = tuple(_table_state(sequence) for sequence in scheduler.running)
    return Snapshot(
        block_size=scheduler.config.block_size,
        blocks=_block_states(scheduler, tables),
        tables=tables,
        num_waiting=scheduler.num_waiting,
    )


def _table_state(sequence: Sequence) -> TableState:
    assert sequence.row is not None, "a running sequence has a row"
    return TableState(
        request_id=sequence.request.request_id,
        index=sequence.index,
        num_siblings=len(sequence.request.sequences),
        row=sequence.row,
        prompt=sequence.request.prompt,
        text=sequence.text,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_tokens=sequence.num_tokens,
        num_computed_tokens=sequence.num_computed_tokens,
        block_ids=tuple(sequence.block_ids),
    )


def _block_states(scheduler: Scheduler, tables: tuple[TableState, ...]) -> tuple[BlockState, ...]:
    size, pool = scheduler.config.block_size, scheduler.pool
    owners: dict[int, list[int]] = collections.defaultdict(list)
    held: dict[int, int] = {}
    for place, table in enumerate(tables):
        left = table.num_computed_tokens
        for block_id in table.block_ids:
            owners[block_id].append(place)
            held[block_id] = max(held.get(block_id, 0), min(left, size))
            left -= size
    states = []
    for block_id, count in enumerate(pool.ref_counts):
        num_tokens = held.get(block_id, 0)
        if block_id == NULL_BLOCK:
            kind = BlockKind.NULL
        elif count:
            kind = BlockKind.USED
        elif block_id in pool.cache:  # whole blocks only
            kind, num_tokens = BlockKind.CACHED, size
        else:
            kind = BlockKind.FREE
        places = tuple(owners.get(block_id, ()))
        states.append(BlockState(block_id, kind, num_tokens, count, places))
    return tuple(states)
