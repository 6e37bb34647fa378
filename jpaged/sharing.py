"""What a sequence can take from the prefix cache, and what it leaves there."""

from typing import NamedTuple

from jpaged.prefix_cache import PrefixCache, chain_digests, root_digest
from jpaged.requests import Sequence


class Hit(NamedTuple):
    """The known prefix of a sequence: whole blocks to share, and a block to copy behind them."""

    block_ids: list[int]
    copied_id: int | None  # holds the first tokens of the sequence's next block
    num_tokens: int  # that need not be computed

    @property
    def all_ids(self) -> list[int]:
        """Every block that the hit reads."""
        return self.block_ids if self.copied_id is None else [*self.block_ids, self.copied_id]

    def without_copy(self, block_size: int) -> "Hit":
        """What is left where there is no room for a copy beside its source."""
        return Hit(self.block_ids, None, len(self.block_ids) * block_size)


NOTHING = Hit([], None, 0)
NUM_AHEAD = 16  # blocks looked up at once: those behind the first that is missing are in vain


def find_prefix(cache: PrefixCache, sequence: Sequence, block_size: int) -> Hit:
    """The longest prefix that is in the cache, short of the last token, whose logits are wanted.

    Behind the last whole block, the block that begins most like the rest is worth a copy when
    more than half of a block comes of it.
    """
    wanted = sequence.num_tokens - 1
    digests = digests_of(sequence, wanted // block_size, block_size)
    block_ids = cache.match(digests)
    start = len(block_ids) * block_size
    parent = digests[len(block_ids) - 1] if block_ids else _root(sequence)
    rest = sequence.token_ids[start : min(start + block_size, wanted)]
    copied_id, length = cache.closest_child(parent, rest)
    if 2 * length <= block_size:
        return Hit(block_ids, None, start)
    return Hit(block_ids, copied_id, start + length)


def num_known_blocks(cache: PrefixCache, sequence: Sequence, block_size: int) -> int:
    """Whole blocks of the sequence's prefix in the cache, if those seen last are still there."""
    known, digests = sequence.num_hit_blocks, sequence.digests
    if known < len(digests) and not cache.has(digests[known]):
        return known  # as a rule: this is asked of 32 sequences in a step
    most = (sequence.num_tokens - 1) // block_size
    while known < most:
        ahead = min(known + NUM_AHEAD, most)
        known += len(cache.match(digests_of(sequence, ahead, block_size, first=known)))
        if known < ahead:
            break
    return known


def register_filled(
    cache: PrefixCache, sequence: Sequence, start: int, end: int, block_size: int
) -> None:
    """Makes known the blocks that writing the tokens `start` to `end - 1` fills."""
    first, last = start // block_size, end // block_size
    digests = digests_of(sequence, last, block_size)
    root = _root(sequence)
    for index in range(first, last):
        position = index * block_size
        cache.register(
            sequence.block_ids[index],
            digests[index],
            parent=digests[index - 1] if index else root,
            token_ids=sequence.token_ids[position : position + block_size],
            written_whole=position >= start,
        )


def digests_of(sequence: Sequence, end: int, block_size: int, *, first: int = 0) -> list[bytes]:
    """The digests of the sequence's blocks from `first` to before `end`, each computed once."""
    known = sequence.digests
    if len(known) < end:
        parent = known[-1] if known else _root(sequence)
        rest = sequence.token_ids[len(known) * block_size : end * block_size]
        known += chain_digests(parent, rest, block_size)
    return known[first:end]


def _root(sequence: Sequence) -> bytes:
    return root_digest(sequence.request.params.cache_salt)
