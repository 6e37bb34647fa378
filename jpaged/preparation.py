"""What a few steps need done before them, as packed vectors for one small program.

Blocks that were shared are copied before their new owner writes, and the tables of sequences that
found a long prefix in the cache get more entries than a step's own batch has room for.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Int32

MAX_UPDATES = 1024  # table entries of one preparation


def preparation_size(max_num_seqs: int) -> int:
    """Words in a packed preparation; a step copies at most one block for each of its rows."""
    return 1 + 2 * max_num_seqs + 3 * MAX_UPDATES


def pack_preparations(
    copies: tuple[tuple[int, int], ...],
    updates: list[tuple[int, int, int]],
    *,
    max_num_seqs: int,
) -> Iterator[np.ndarray]:
    """As many vectors as it takes, none where there is nothing to do; the first has the copies."""
    while copies or updates:
        packed = np.zeros(preparation_size(max_num_seqs), np.int32)
        entries = packed[1 + 2 * max_num_seqs :].reshape(-1, 3)
        entries[:, 0] = max_num_seqs  # a row that does not exist
        packed[0] = len(copies)
        packed[1 : 1 + 2 * len(copies)] = np.reshape(copies, -1)
        taken = updates[:MAX_UPDATES]
        entries[: len(taken)] = np.reshape(taken, (-1, 3))
        yield packed
        copies, updates = (), updates[MAX_UPDATES:]


def unpack_preparation(
    packed: Int32[Array, " X"], max_num_seqs: int
) -> tuple[Int32[Array, "C 2"], Int32[Array, ""], Int32[Array, "U 3"]]:
    """The copies, how many of them count, and the table entries; runs inside jit."""
    copies = packed[1 : 1 + 2 * max_num_seqs].reshape(-1, 2)
    return copies, packed[0], packed[1 + 2 * max_num_seqs :].reshape(-1, 3)
