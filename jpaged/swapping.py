"""Which of the waiting sequences have their keys and values in host memory, and where."""

from typing import NamedTuple

from jpaged.requests import Sequence


class Stored(NamedTuple):
    """What lies in host memory of one sequence: the K/V of its first tokens, block by block."""

    space_ids: list[int]
    num_tokens: int


NOTHING_STORED = Stored([], 0)


class Swapping:
    """Gives host blocks to sequences that are preempted, as long as there are enough.

    What a sequence has stored is given up when it starts again, or ends.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_ids = list(range(num_blocks - 1, -1, -1))
        self.stored: dict[Sequence, Stored] = {}

    @property
    def num_used(self) -> int:
        """Host blocks that hold something."""
        return self.num_blocks - len(self.free_ids)

    def store(self, sequence: Sequence) -> list[tuple[int, int]]:
        """The (block, host block) moves that save all that was computed of a running sequence.

        No moves where there is no room for all of it: then it is computed again.
        """
        count = len(sequence.block_ids)
        if count > len(self.free_ids):
            return []
        space_ids = [self.free_ids.pop() for _ in range(count)]
        self.stored[sequence] = Stored(space_ids, sequence.num_computed_tokens)
        return list(zip(sequence.block_ids, space_ids, strict=True))

    def take(self, sequence: Sequence) -> Stored:
        """What is stored of the sequence. Its place may be given to others from here on."""
        stored = self.stored.pop(sequence, None)
        if stored is None:
            return NOTHING_STORED
        self.free_ids += stored.space_ids
        return stored
