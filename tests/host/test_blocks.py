"""The pool of block ids."""

import random

import pytest

from jpaged.blocks import NULL_BLOCK, BlockPool
from jpaged.errors import JpagedError, OutOfBlocksError
from jpaged.prefix_cache import PrefixCache


def test_every_block_but_the_null_block_is_given_out_once():
    pool = BlockPool(7, PrefixCache())
    block_ids = pool.allocate(6)
    assert sorted(block_ids) == [1, 2, 3, 4, 5, 6]
    assert NULL_BLOCK not in block_ids
    assert (pool.num_free, pool.num_used) == (0, 6)


def test_failed_allocation_names_both_numbers_and_takes_nothing():
    pool = BlockPool(6, PrefixCache())
    held = pool.allocate(2)
    before = (pool.free_ids, list(pool.ref_counts))
    with pytest.raises(OutOfBlocksError, match="need 4 blocks, 3 of 5 free"):
        pool.allocate(4)
    assert (pool.free_ids, pool.ref_counts) == before
    assert pool.num_used == len(held)
    assert issubclass(OutOfBlocksError, JpagedError)


def test_freed_block_is_reused_before_a_fresh_one():
    pool = BlockPool(9, PrefixCache())
    first, second, _ = pool.allocate(3)
    pool.free([second])
    pool.free([first])
    assert pool.allocate(2) == [first, second]


def test_nothing_is_allocated_for_a_count_of_zero():
    pool = BlockPool(3, PrefixCache())
    assert pool.allocate(0) == []
    assert pool.num_free == 2


def test_a_block_freed_twice_is_caught():
    pool = BlockPool(4, PrefixCache())
    block_ids = pool.allocate(2)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block_ids[:1])


def test_a_pool_of_the_null_block_alone_and_a_negative_count_are_refused():
    with pytest.raises(ValueError, match="num_blocks must be at least 2, got 1"):
        BlockPool(1, PrefixCache())
    with pytest.raises(ValueError, match="at least 0, got -3"):
        BlockPool(5, PrefixCache()).allocate(-3)


def test_blocks_are_neither_lost_nor_doubled_by_twenty_thousand_random_operations():
    rng = random.Random(11)
    pool = BlockPool(38, PrefixCache())
    held: list[list[int]] = []
    for _ in range(20_000):
        if held and rng.random() < 0.5:
            pool.free(held.pop(rng.randrange(len(held))))
        else:
            count = rng.randrange(9)
            if count > pool.num_free:
                with pytest.raises(OutOfBlocksError):
                    pool.allocate(count)
            else:
                held.append(pool.allocate(count))
        blocks = [block for table in held for block in table]
        assert sorted([*blocks, *pool.free_ids]) == list(range(1, 38))
        assert [block for block in range(38) if pool.ref_counts[block]] == sorted(blocks)
