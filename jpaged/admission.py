"""Which waiting sequence starts next, and with how much of the prefix cache."""

from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.requests import Sequence
from jpaged.sharing import NOTHING, Hit, find_prefix, num_known_blocks
from jpaged.waiting import WaitingQueue


class Admission:
    """Prefers, among the first of the best priority that wait, the one with the longest hit.

    So prompts that begin alike follow each other while their prefix is in the pool. Whoever has
    no patience left goes before them, in order: it was overtaken as often as may be, or it has run
    before. Whoever is to start next holds up all others until it finds room.

    `Sequence.num_hit_blocks` is what was seen of its prefix last, and at least what is there now
    once `_whose_turn` has looked for more; what was evicted since is found out before a start.
    While nothing can start, a step so costs one look-up a candidate, and none is matched again.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, waiting: WaitingQueue) -> None:
        self.config = config
        self.pool = pool
        self.waiting = waiting
        self._blocked: tuple[Sequence, int] | None = None  # the last that found no room, its hit
        self._num_wanted = 0  # the free blocks that it wanted

    def next(self, num_free: int) -> tuple[Sequence, Hit] | None:
        """The sequence to start and its hit; None while `num_free` blocks are too few for it."""
        if not self.config.enable_prefix_caching:
            sequence = self.waiting.front[0]
            return (sequence, NOTHING) if self._num_taken(sequence, NOTHING) <= num_free else None
        while True:
            sequence = self._whose_turn()
            num_hit = sequence.num_hit_blocks
            if self.config.blocks_for(sequence.num_tokens) - num_hit > num_free:
                return None
            if self._blocked == (sequence, num_hit) and self._num_wanted > num_free:
                return None
            hit = find_prefix(self.pool.cache, sequence, self.config.block_size)
            sequence.num_hit_blocks = len(hit.block_ids)
            if sequence.num_hit_blocks == num_hit:
                return self._if_there_is_room(sequence, hit, num_free)

    def _whose_turn(self) -> Sequence:
        """Whose turn it is, by what is known of the prefixes."""
        cache, size = self.pool.cache, self.config.block_size
        best = None
        for sequence in self.waiting.candidates:
            sequence.num_hit_blocks = num_known_blocks(cache, sequence, size)
            if not sequence.patience:
                return sequence
            if best is None or sequence.num_hit_blocks > best.num_hit_blocks:
                best = sequence
        assert best is not None, "somebody waits"
        return best

    def _if_there_is_room(
        self, sequence: Sequence, hit: Hit, num_free: int
    ) -> tuple[Sequence, Hit] | None:
        """The pair, without the copy where that is too much; None, and why kept, where all is."""
        num_wanted = self._num_taken(sequence, hit)
        if hit.copied_id is not None and num_wanted > num_free:
            hit = hit.without_copy(self.config.block_size)
            num_wanted = self._num_taken(sequence, hit)
        if num_wanted <= num_free:
            self._blocked = None
            return sequence, hit
        # It will want no less until more of its prefix is there, or a start makes some of that
        # prefix somebody's: both are seen here.
        self._blocked = (sequence, sequence.num_hit_blocks)
        self._num_wanted = num_wanted
        return None

    def _num_taken(self, sequence: Sequence, hit: Hit) -> int:
        """Free blocks that are so no more when the sequence starts, if only to be copied."""
        num_new = self.config.blocks_for(sequence.num_tokens) - len(hit.block_ids)
        return num_new + self.pool.num_free_among(hit.all_ids)
