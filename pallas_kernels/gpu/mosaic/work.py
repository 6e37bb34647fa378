"""What there is to do in a decode step, as one list that the programs of a fixed grid share out."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

ROW, PLACE, START, END = range(4)  # the columns of the list


def list_splits(
    seq_lens: Int32[Array, " B"], *, split_tokens: int, max_splits: int, window: int | None
) -> tuple[Int32[Array, "I 4"], Int32[Array, " 1"]]:
    """Every split with a visible token, and how many there are; what lies behind is undefined.

    Of each: its row, its place among the row's splits, its first visible token and the one behind
    its last. Nothing is scanned, and the list is the same in all layers of a step, so that XLA
    makes it once.
    """
    B = seq_lens.shape[0]
    starts_B = jnp.zeros_like(seq_lens) if window is None else jnp.maximum(seq_lens - window, 0)
    first_splits_B = starts_B // split_tokens
    counts_B = -(-seq_lens // split_tokens) - first_splits_B
    rows = jnp.arange(B, dtype=jnp.int32)
    before_B = jnp.sum(jnp.where(rows[None, :] < rows[:, None], counts_B[None, :], 0), axis=1)
    places_X = jnp.arange(max_splits, dtype=jnp.int32)
    begins_BX = (first_splits_B[:, None] + places_X[None, :]) * split_tokens
    shape = begins_BX.shape
    items = jnp.stack(
        [
            jnp.broadcast_to(rows[:, None], shape),
            jnp.broadcast_to(places_X[None, :], shape),
            jnp.maximum(begins_BX, starts_B[:, None]),
            jnp.minimum(begins_BX + split_tokens, seq_lens[:, None]),
        ],
        axis=-1,
    )
    is_live_BX = places_X[None, :] < counts_B[:, None]
    size = B * max_splits
    # What is not live goes behind the end, each to a place of its own.
    dead_BX = size + jnp.arange(size, dtype=jnp.int32).reshape(shape)
    at_BX = jnp.where(is_live_BX, before_B[:, None] + places_X[None, :], dead_BX)
    listed = jnp.zeros((size, 4), jnp.int32)
    listed = listed.at[at_BX].set(items, mode="drop", unique_indices=True)
    return listed, jnp.sum(counts_B, dtype=jnp.int32)[None]
