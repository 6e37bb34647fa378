"""What a few steps need done before them, as packed vectors for one small program.

Blocks that were shared are copied before their new owner writes, and the tables of sequences that
found a long prefix in the cache get more entries than a step's own batch has room for.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jpaged.batch import host_zeros, pack
from jpaged.state import Preparation

MAX_UPDATES = 1024  # table entries of one preparation


def preparation_spec(max_num_seqs: int) -> Preparation:
    """The shapes and dtypes of a preparation; a step copies at most one block for each row."""
    make: Any = Preparation  # of specs here, of arrays elsewhere
    return make(
        num_copies=jax.ShapeDtypeStruct((1,), np.int32),
        copies=jax.ShapeDtypeStruct((max_num_seqs, 2), np.int32),
        table_updates=jax.ShapeDtypeStruct((MAX_UPDATES, 3), np.int32),
    )


def pack_preparations(
    copies: tuple[tuple[int, int], ...],
    updates: list[tuple[int, int, int]],
    *,
    max_num_seqs: int,
) -> Iterator[np.ndarray]:
    """As many vectors as it takes, none where there is nothing to do; the first has the copies."""
    while copies or updates:
        preparation = host_zeros(preparation_spec(max_num_seqs))
        preparation.table_updates[:, 0] = max_num_seqs  # a row that does not exist
        preparation.num_copies[0] = len(copies)
        preparation.copies[: len(copies)] = np.reshape(copies, (-1, 2))
        taken = updates[:MAX_UPDATES]
        preparation.table_updates[: len(taken)] = np.reshape(taken, (-1, 3))
        yield pack(preparation)
        copies, updates = (), updates[MAX_UPDATES:]
