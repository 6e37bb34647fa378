"""The pool's layout, and what attention needs to know about one step's batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

NULL_BLOCK = 0  # padding reads and writes land here; never allocated
MASKED = -1e30  # finite: with -inf, a row that sees nothing becomes NaN


def pool_shape(
    *, num_blocks: int, num_kv_heads: int, block_size: int, head_size: int
) -> tuple[int, int, int, int]:
    """One layer's pool, `[P, K, S, 2H]`: keys in lanes 0..H-1, values in lanes H..2H-1.

    K and V of a slot share a row, so that one copy brings both and a head size of 64 fills a
    TPU's 128 lanes; the two minor axes are (S, 2H), so any number of KV heads tiles unpadded.
    """
    return (num_blocks, num_kv_heads, block_size, 2 * head_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """A ragged batch: row r owns tokens `query_starts[r]` to `query_starts[r+1]` of the T axis.

    Its tokens are the last ones of a context of `seq_lens[r]` tokens, all of them already written
    to the pool. Rows 0 to `num_decodes - 1` have exactly one token each, so row r's token is token
    r; the others follow; padding rows come last, with `seq_lens` 0 and `query_starts` repeated.
    Tables are padded with the null block.
    """

    block_tables: Int32[Array, "B M"]
    query_starts: Int32[Array, "B+1"]
    seq_lens: Int32[Array, " B"]
    num_decodes: Int32[Array, ""]


def decode_batch(block_tables: Int32[Array, "B M"], seq_lens: Int32[Array, " B"]) -> PagedBatch:
    """A batch of one token a row; rows of length 0 see nothing, wherever they stand."""
    B = seq_lens.shape[0]
    starts = jnp.arange(B + 1, dtype=jnp.int32)
    return PagedBatch(block_tables, starts, seq_lens, jnp.int32(B))


def rows_of_tokens(batch: PagedBatch, num_tokens: int) -> Int32[Array, " T"]:
    """Each token's row; padding tokens get the number of rows, which no row has."""
    tokens_T = jnp.arange(num_tokens, dtype=jnp.int32)
    # By comparing with all: a binary search is a loop, whose turns are kernels of their own.
    rows_T = jnp.searchsorted(batch.query_starts[1:], tokens_T, side="right", method="compare_all")
    return rows_T.astype(jnp.int32)


def positions_of_tokens(batch: PagedBatch, rows: Int32[Array, " T"]) -> Int32[Array, " T"]:
    """Each token's position in its sequence; padding tokens get a negative one."""
    T = rows.shape[0]
    ends_B = batch.query_starts[1:]
    last_T = jnp.take(batch.seq_lens, rows, mode="fill", fill_value=0)
    end_T = jnp.take(ends_B, rows, mode="fill", fill_value=T + 1)
    positions_T = last_T - end_T + jnp.arange(T, dtype=jnp.int32)
    return jnp.where(rows < batch.seq_lens.shape[0], positions_T, -1)


def slots_of_tokens(
    batch: PagedBatch,
    rows: Int32[Array, " T"],
    positions: Int32[Array, " T"],
    *,
    block_size: int,
) -> Int32[Array, " T"]:
    """Each token's slot, `block * S + offset`; padding tokens get the null block's first."""
    columns_T = jnp.maximum(positions, 0) // block_size
    blocks_T = batch.block_tables.at[rows, columns_T].get(mode="fill", fill_value=NULL_BLOCK)
    slots_T = blocks_T * block_size + positions % block_size
    return jnp.where(positions >= 0, slots_T, NULL_BLOCK)
