"""The pool of block ids: who holds which block, never what is in it."""

from collections.abc import Iterable

from jpaged.errors import OutOfBlocksError

NULL_BLOCK = 0  # padding reads and writes land here; never allocated


class BlockPool:
    """Hands out block ids 1 to `num_blocks` - 1, and counts who refers to each.

    A block is free exactly when its count is 0; free blocks stand in one list. The block freed
    last is reused first: its memory is the likeliest to be in a cache.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2, got {num_blocks}: block 0 is never used"
            )
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free_ids)

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - 1 - len(self._free_ids)

    @property
    def free_ids(self) -> tuple[int, ...]:
        """The free blocks, the next one to be given out last."""
        return tuple(self._free_ids)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, or raises `OutOfBlocksError` and takes none."""
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count > len(self._free_ids):
            raise OutOfBlocksError(
                f"need {count} blocks, {len(self._free_ids)} of {self.num_blocks - 1} free; "
                "raise num_blocks or lower max_num_seqs"
            )
        block_ids = [self._free_ids.pop() for _ in range(count)]
        for block_id in block_ids:
            self.ref_counts[block_id] = 1
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Gives up one reference to each of `block_ids`."""
        for block_id in block_ids:
            assert self.ref_counts[block_id] > 0, f"block {block_id} was freed twice"
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self._free_ids.append(block_id)
