"""A ragged batch as the prefill kernels see it: a flat list of tiles of queries."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.layout import PagedBatch


def with_decoded(
    q: Float[Array, "T N H"], batch: PagedBatch, decoded: Float[Array, "B N H"]
) -> Float[Array, "T N H"]:
    """The queries, the answers of decode rows in place of theirs.

    A scatter, so that XLA writes these tokens and copies no others.
    """
    T, B = q.shape[0], decoded.shape[0]
    rows = jnp.arange(B)
    tokens_B = jnp.where(rows < batch.num_decodes, rows, T + rows)
    return q.at[tokens_B].set(decoded.astype(q.dtype), mode="drop", unique_indices=True)


def list_tiles(batch: PagedBatch, *, num_tokens: int, query_tokens: int) -> Int32[Array, "tiles 4"]:
    """Each tile's row, first token, number of tokens and first token's position.

    As many as any batch of this shape may need; those left over have no tokens. A row's tiles
    come last first: the longest walks start early. Nothing is scanned, as a scan is many kernels.
    """
    B = batch.seq_lens.shape[0]
    starts_B, ends_B = batch.query_starts[:-1], batch.query_starts[1:]
    rows = jnp.arange(B)
    tiles_B = -((starts_B - ends_B) // query_tokens)
    tiles_B = jnp.where(rows < batch.num_decodes, 0, tiles_B)
    tile_ends_B = jnp.sum(jnp.where(rows[None, :] <= rows[:, None], tiles_B[None, :], 0), axis=1)
    max_tiles = B + (num_tokens - B) // query_tokens  # every row's last tile may be short
    tile = tile_ends_B[-1] - 1 - jnp.arange(max_tiles)
    row = jnp.sum(tile_ends_B[None, :] <= tile[:, None], axis=1)
    first = starts_B[row] + (tile - tile_ends_B[row] + tiles_B[row]) * query_tokens
    count = jnp.where(tile >= 0, jnp.minimum(ends_B[row] - first, query_tokens), 0)
    position = batch.seq_lens[row] - ends_B[row] + first
    return jnp.stack([row, first, count, position], axis=1).astype(jnp.int32)
