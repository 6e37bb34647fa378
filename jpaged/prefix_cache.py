"""Which block holds which tokens after which prefix: full blocks, found by a chain of hashes.

A block's digest is SHA-256 over its parent's digest and its own tokens, and a chain begins at the
digest of a salt, so equal digests mean equal prefixes (no prefix of other users can be guessed
without their salt). As in vLLM's automatic prefix caching; the chain is that of Zheng et al.'s
radix tree (SGLang, arXiv 2312.07104) with fixed-size edges.
"""

import array
import dataclasses
import hashlib
from collections.abc import ItemsView, Sequence


def root_digest(salt: str | None) -> bytes:
    """Where the chains of a salt begin; an empty salt is one too."""
    return hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()


def chain_digests(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The digests of the full blocks of `token_ids`, which follow `parent`."""
    data = array.array("i", token_ids).tobytes()
    width = 4 * block_size
    digests = []
    for start in range(0, len(data) - width + 1, width):
        parent = hashlib.sha256(parent + data[start : start + width]).digest()
        digests.append(parent)
    return digests


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What a block holds: its tokens, after the prefix of `parent`."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class PrefixCache:
    """The blocks that can be shared, by digest; it owns none of them.

    A block is registered when the step that fills it is planned, and is provisional until `settle`
    says that the step is done. Meanwhile it can be hit only if that step writes all of it.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, Entry] = {}
        # By parent and first token: most children of a salt's root begin differently.
        self._children: dict[tuple[bytes, int], dict[int, tuple[int, ...]]] = {}
        self._provisional: dict[int, bool] = {}  # whether the step writes all of the block

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def digest_of(self, block_id: int) -> bytes | None:
        """The digest that a block is registered under."""
        entry = self.entry_of(block_id)
        return None if entry is None else entry.digest

    def entry_of(self, block_id: int) -> Entry | None:
        """What a block is registered with."""
        return self._entries.get(block_id)

    def items(self) -> ItemsView[bytes, int]:
        """Every digest and its block."""
        return self._blocks.items()

    def is_unsettled(self, block_id: int) -> bool:
        """Whether the block may still be written: it is unknown, or filled by the planned step."""
        return block_id not in self._entries or block_id in self._provisional

    def register(
        self,
        block_id: int,
        digest: bytes,
        *,
        parent: bytes,
        token_ids: Sequence[int],
        written_whole: bool,
    ) -> None:
        """Makes a block known from this step on; one that holds what another does stays private."""
        if digest in self._blocks:
            return
        assert block_id not in self._entries, f"block {block_id} is registered already"
        entry = Entry(digest, parent, tuple(token_ids))
        self._blocks[digest] = block_id
        self._entries[block_id] = entry
        siblings = self._children.setdefault((parent, entry.token_ids[0]), {})
        siblings[block_id] = entry.token_ids
        self._provisional[block_id] = written_whole

    def settle(self) -> None:
        """The step of all provisional entries is done."""
        self._provisional.clear()

    def has(self, digest: bytes) -> bool:
        """Whether a block is registered under the digest."""
        return digest in self._blocks

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `digests`."""
        found = []
        for digest in digests:
            block_id = self._blocks.get(digest)
            if block_id is None or not self._provisional.get(block_id, True):
                break
            found.append(block_id)
        return found

    def closest_child(self, parent: bytes, token_ids: Sequence[int]) -> tuple[int, int]:
        """The block after `parent` that shares most leading tokens with `token_ids`, and how many.

        Only blocks whose contents are there before this step; (0, 0) where nothing is shared.
        """
        best = (0, 0)
        siblings = self._children.get((parent, token_ids[0]), {}) if token_ids else {}
        for block_id, held in siblings.items():
            if block_id in self._provisional:
                continue
            length = _common_prefix(held, token_ids)
            if length > best[1]:
                best = (block_id, length)
        return best

    def forget(self, block_id: int) -> None:
        """Drops a block that is to hold something else."""
        entry = self._entries.pop(block_id)
        del self._blocks[entry.digest]
        key = (entry.parent, entry.token_ids[0])
        del self._children[key][block_id]
        if not self._children[key]:
            del self._children[key]
        self._provisional.pop(block_id, None)

    def clear(self) -> None:
        """Drops everything."""
        self.__init__()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
