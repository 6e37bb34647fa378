"""The pool of block ids: who holds which block, and which free blocks are worth keeping."""

import collections
from collections.abc import Sequence

from jpaged.errors import OutOfBlocksError
from jpaged.prefix_cache import PrefixCache

NULL_BLOCK = 0  # padding reads and writes land here; never allocated


class BlockPool:
    """Hands out block ids 1 to `num_blocks` - 1, and counts who refers to each.

    A block is free exactly when its count is 0. A free block that the prefix cache knows can be
    shared again until it is given out anew: those without use for the cache go first, then those
    freed longest ago.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2, got {num_blocks}: block 0 is never used"
            )
        self.num_blocks = num_blocks
        self.cache = cache
        self.ref_counts = [0] * num_blocks
        # The block freed last is reused first: its memory is the likeliest to be in a CPU's cache.
        self._blank_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached_ids: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._blank_ids) + len(self._cached_ids)

    @property
    def num_cached(self) -> int:
        """Free blocks that the prefix cache still knows."""
        return len(self._cached_ids)

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - 1 - self.num_free

    @property
    def free_ids(self) -> tuple[int, ...]:
        """The free blocks in the order in which they will be given out."""
        return (*reversed(self._blank_ids), *self._cached_ids)

    def num_free_among(self, block_ids: Sequence[int]) -> int:
        """How many of `block_ids` are free, so that sharing them leaves fewer to allocate."""
        return sum(self.ref_counts[block_id] == 0 for block_id in block_ids)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, or raises `OutOfBlocksError` and takes none."""
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count > self.num_free:
            raise OutOfBlocksError(
                f"need {count} blocks, {self.num_free} of {self.num_blocks - 1} free; "
                "raise num_blocks or lower max_num_seqs"
            )
        num_blank = min(count, len(self._blank_ids))
        block_ids = self._blank_ids[len(self._blank_ids) - num_blank :][::-1]
        del self._blank_ids[len(self._blank_ids) - num_blank :]
        for _ in range(count - num_blank):
            block_id, _ = self._cached_ids.popitem(last=False)
            self.cache.forget(block_id)
            block_ids.append(block_id)
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """Takes one more reference to each of `block_ids`, which are held or cached."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self._cached_ids[block_id]
            self.ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Gives up one reference to each block of a table; its tail will be reused first."""
        for block_id in reversed(block_ids):
            assert self.ref_counts[block_id] > 0, f"block {block_id} was freed twice"
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                if block_id in self.cache:
                    self._cached_ids[block_id] = None
                else:
                    self._blank_ids.append(block_id)

    def forget_cached(self) -> None:
        """Makes every block blank to the cache; those in use stay in use."""
        self.cache.clear()
        self._blank_ids[:0] = reversed(self._cached_ids)
        self._cached_ids.clear()
