"""Block tables: how one grows, and how a tail that is shared becomes its sequence's own."""

from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.requests import Sequence


def num_new_blocks(pool: BlockPool, sequence: Sequence, end: int, config: EngineConfig) -> int:
    """Blocks to allocate before the sequence can write its tokens before `end`."""
    # Asked of every row in every step, so nothing is called.
    size, held = config.block_size, sequence.block_ids
    grown = -(-end // size) - len(held)
    if sequence.num_computed_tokens % size and pool.ref_counts[held[-1]] > 1:
        return grown + 1  # a copy of the tail
    return grown


def own_tail(
    pool: BlockPool, sequence: Sequence, block_size: int, copies: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Replaces a shared tail by a copy: the (column, block) that the device must learn.

    The copy itself, from block to block, is added to `copies`.
    """
    if not _shares_tail(pool, sequence, block_size):
        return []
    (block_id,) = pool.allocate(1)
    copies.append((sequence.block_ids[-1], block_id))
    pool.free(sequence.block_ids[-1:])
    sequence.block_ids[-1] = block_id
    return [(len(sequence.block_ids) - 1, block_id)]


def grow(
    pool: BlockPool, sequence: Sequence, end: int, config: EngineConfig
) -> list[tuple[int, int]]:
    """Allocates what the tokens before `end` need: the (column, block) pairs that are new."""
    num_held = len(sequence.block_ids)
    new_ids = pool.allocate(config.blocks_for(end) - num_held)
    sequence.block_ids += new_ids
    return list(enumerate(new_ids, num_held))


def num_filled_slots(pool: BlockPool, tables: list[tuple[list[int], int]], block_size: int) -> int:
    """Filled slots of the blocks in use, where `tables` hold so many tokens each.

    Only the last block of a table may have empty ones.
    """
    empty = {ids[-1]: -num_tokens % block_size for ids, num_tokens in tables if ids}
    return pool.num_used * block_size - sum(empty.values())


def _shares_tail(pool: BlockPool, sequence: Sequence, block_size: int) -> bool:
    """Whether the block that the sequence writes next is half full and somebody else's too."""
    return (
        sequence.num_computed_tokens % block_size > 0
        and pool.ref_counts[sequence.block_ids[-1]] > 1
    )
