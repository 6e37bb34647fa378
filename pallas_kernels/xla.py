"""The `xla` backend: plain jax.numpy with bounded memory, written for speed on a CPU.

Every loop here walks block columns under a dynamic trip count with an online softmax
(Milakov and Gimelshein, arXiv 1805.02867), so time follows the tokens that are live, not the
width of the table, and no padded copy of a context is ever made.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Real

from pallas_kernels.layout import MASKED, PagedBatch
from pallas_kernels.quantize import product_dtype

# Rows and tokens of a tile: rows x tokens x K x 2H x 4 bytes should stay inside a core's L2 cache;
# at 3 KV heads of size 64, 8 rows of 128 tokens are 1.5 MB.
DECODE_ROWS = 8
DECODE_TOKENS = 128
QUERY_TOKENS = 64
CONTEXT_TOKENS = 256


class Softmax(NamedTuple):
    """An online softmax's running state: the highest logit, the sum, the weighted values."""

    high: Float[Array, "*dims 1"]
    total: Float[Array, "*dims 1"]
    values: Float[Array, "*dims H"]


class PerHead(NamedTuple):
    """What differs from head to head, in shapes that go with logits of [*dims, Q, C]."""

    scale: Float[Array, "*dims 1 1"]  # of logits, with what the keys are stored by
    value_scale: Float[Array, "*dims 1 1"]
    sinks: Float[Array, "*dims Q 1"]


def paged_decode(
    q: Float[Array, "B N H"],
    pool: Real[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row, in groups of rows; a row of length 0 gives zeros.

    A group walks as far as its longest row, and a group without tokens costs nothing: rows sorted
    by length waste least.
    """
    B, N, H = q.shape
    K = pool.shape[1]
    rows = min(B, DECODE_ROWS)
    groups = math.ceil(B / rows)
    padding = groups * rows - B
    q_groups = jnp.pad(q.reshape(B, K, N // K, H), [(0, padding), (0, 0), (0, 0), (0, 0)])
    tables = jnp.pad(block_tables, [(0, padding), (0, 0)])
    lens = jnp.pad(seq_lens, [(0, padding)])
    per_head = jax.tree.map(lambda x: x[None], _per_head(scale, sinks, kv_scales, heads=(N, K)))

    def attend(group: Int32[Array, ""], out: Float[Array, "B K G H"]) -> Float[Array, "B K G H"]:
        def take(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, group * rows, rows)

        found = _decode_group(
            take(q_groups), pool, take(tables), take(lens), per_head, window, soft_cap
        )
        found = found.astype(out.dtype)  # the group worked in the pool's dtype
        return jax.lax.dynamic_update_slice_in_dim(out, found, group * rows, 0)

    live_groups = jnp.max(jnp.where(lens > 0, jnp.arange(groups * rows) // rows + 1, 0))
    out = jnp.zeros((groups * rows, K, N // K, H), q.dtype)
    if groups == 1:
        out = attend(jnp.int32(0), out)
    else:
        out = jax.lax.fori_loop(0, live_groups, attend, out)
    return out[:B].reshape(B, N, H)


def _decode_group(
    q: Float[Array, "B K G H"],
    pool: Real[Array, "P K S W"],
    tables: Int32[Array, "B M"],
    lens: Int32[Array, " B"],
    per_head: PerHead,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "B K G H"]:
    """One group of rows against its blocks, a tile of block columns a turn."""
    B, K, G, H = q.shape
    S = pool.shape[2]
    columns = max(1, DECODE_TOKENS // S)
    tokens = columns * S
    tables = jnp.pad(tables, [(0, 0), (0, -tables.shape[1] % columns)])
    heads_K = jnp.arange(K)
    q = q.astype(product_dtype(q, pool))

    def walk(tile: Int32[Array, ""], state: Softmax) -> Softmax:
        blocks_BM = jax.lax.dynamic_slice_in_dim(tables, tile * columns, columns, axis=1)
        # Heads are part of the index, so that the gather itself puts them before the tokens.
        kv = pool[blocks_BM[:, None, :], heads_K[None, :, None]].reshape(B, K, tokens, 2 * H)
        positions_C = tile * tokens + jnp.arange(tokens)
        visible_BC = positions_C[None, :] < lens[:, None]
        # Unused slots may hold NaN. A quantised tile becomes what the query is, here and no larger.
        kv = jnp.where(visible_BC[:, None, :, None], kv, 0).astype(q.dtype)
        if window is not None:
            visible_BC &= positions_C[None, :] >= lens[:, None] - window
        keys, values = kv[..., :H], kv[..., H:]
        visible = visible_BC[:, None, None, :]
        return _absorb(state, q, keys, values, visible, per_head.scale, soft_cap)

    state = Softmax(
        jnp.full((B, K, G, 1), MASKED, jnp.float32),
        jnp.zeros((B, K, G, 1), jnp.float32),
        jnp.zeros((B, K, G, H), jnp.float32),
    )
    first = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(jnp.min(jnp.where(lens > 0, lens, jnp.max(lens))) - window, 0) // tokens
    state = jax.lax.fori_loop(first, -(-jnp.max(lens) // tokens), walk, state)
    return _finish(state, per_head).astype(q.dtype)


def paged_prefill(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    batch: PagedBatch,
    decoded: Float[Array, "B N H"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch whose decode rows are `decoded` already.

    The others go tile by tile: a tile is up to QUERY_TOKENS queries of one row, and walks its
    context up to its last query.
    """
    T, N, H = q.shape
    K = pool.shape[1]
    B = batch.seq_lens.shape[0]
    query_lens_B = batch.query_starts[1:] - batch.query_starts[:-1]
    query_tokens = min(QUERY_TOKENS, T)
    tiles_B = jnp.where(jnp.arange(B) < batch.num_decodes, 0, -(-query_lens_B // query_tokens))
    tile_ends_B = jnp.cumsum(tiles_B)
    q_padded = jnp.pad(q, [(0, query_tokens), (0, 0), (0, 0)]).reshape(-1, K, N // K, H)
    per_head = _per_head(scale, sinks, kv_scales, heads=(N, K))

    def attend(tile: Int32[Array, ""], out: Float[Array, "T K G H"]) -> Float[Array, "T K G H"]:
        row = jnp.searchsorted(tile_ends_B, tile, side="right")
        start = batch.query_starts[row]
        start += (tile - tile_ends_B[row] + tiles_B[row]) * query_tokens
        end = jnp.minimum(start + query_tokens, batch.query_starts[row + 1])
        queries = jax.lax.dynamic_slice_in_dim(q_padded, start, query_tokens)
        positions = batch.seq_lens[row] - batch.query_starts[row + 1] + start
        positions += jnp.arange(query_tokens)
        last = positions[0] + end - start - 1
        found = _prefill_tile(
            queries, pool, batch.block_tables[row], positions, last, per_head, window, soft_cap
        )
        old = jax.lax.dynamic_slice_in_dim(out, start, query_tokens)
        mine = (start + jnp.arange(query_tokens) < end)[:, None, None, None]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, found, old), start, 0)

    out = jnp.zeros_like(q_padded)
    out = jax.lax.dynamic_update_slice_in_dim(out, decoded.reshape(B, K, N // K, H), 0, 0)
    out = jax.lax.fori_loop(0, tile_ends_B[-1], attend, out)
    return out[:T].reshape(T, N, H)


def _prefill_tile(
    q: Float[Array, "T K G H"],
    pool: Real[Array, "P K S W"],
    table: Int32[Array, " M"],
    positions: Int32[Array, " T"],
    last: Int32[Array, ""],
    per_head: PerHead,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "T K G H"]:
    """Consecutive queries of one row against its context up to position `last`."""
    T, K, G, H = q.shape
    S = pool.shape[2]
    columns = max(1, CONTEXT_TOKENS // S)
    tokens = columns * S
    table = jnp.pad(table, (0, -table.shape[0] % columns))
    heads_K = jnp.arange(K)
    q_KQH = jnp.moveaxis(q, 0, 1).reshape(K, T * G, H).astype(product_dtype(q, pool))
    positions_Q = jnp.repeat(positions, G)
    per_head = per_head._replace(sinks=jnp.tile(per_head.sinks, (1, T, 1)))

    def walk(tile: Int32[Array, ""], state: Softmax) -> Softmax:
        blocks_M = jax.lax.dynamic_slice_in_dim(table, tile * columns, columns)
        kv = pool[blocks_M[None, :], heads_K[:, None]].reshape(K, tokens, 2 * H)
        context_C = tile * tokens + jnp.arange(tokens)
        kv = jnp.where((context_C <= last)[None, :, None], kv, 0).astype(q_KQH.dtype)
        visible_QC = context_C[None, :] <= jnp.minimum(positions_Q, last)[:, None]
        if window is not None:
            visible_QC &= context_C[None, :] > positions_Q[:, None] - window
        keys, values = kv[..., :H], kv[..., H:]
        return _absorb(state, q_KQH, keys, values, visible_QC[None], per_head.scale, soft_cap)

    state = Softmax(
        jnp.full((K, T * G, 1), MASKED, jnp.float32),
        jnp.zeros((K, T * G, 1), jnp.float32),
        jnp.zeros((K, T * G, H), jnp.float32),
    )
    first = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(positions[0] - window + 1, 0) // tokens
    state = jax.lax.fori_loop(first, last // tokens + 1, walk, state)
    return jnp.moveaxis(_finish(state, per_head).reshape(K, T, G, H), 1, 0).astype(q.dtype)


def _per_head(
    scale: float,
    sinks: Float[Array, " N"] | None,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    heads: tuple[int, int],
) -> PerHead:
    """Both of them in the shapes of [K, G, C] logits; where there is none, what changes nothing."""
    N, K = heads
    sinks = jnp.full(N, MASKED) if sinks is None else sinks
    kv_scales = jnp.ones((2, K)) if kv_scales is None else kv_scales
    key_scale, value_scale = kv_scales.astype(jnp.float32).reshape(2, K, 1, 1)
    return PerHead(scale * key_scale, value_scale, sinks.astype(jnp.float32).reshape(K, N // K, 1))


def _absorb(
    state: Softmax,
    q: Float[Array, "*dims Q A"],
    keys: Float[Array, "*dims C A"],
    values: Float[Array, "*dims C D"],
    visible: Bool[Array, "..."],
    scale: Float[Array, "*#dims 1 1"],
    soft_cap: float | None,
) -> Softmax:
    """The state after one more tile. Masked values must be finite: zero times NaN is NaN."""
    logits = jnp.einsum("...QA,...CA->...QC", q, keys, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible, logits, MASKED)
    high = jnp.maximum(state.high, jnp.max(logits, axis=-1, keepdims=True))
    shrink = jnp.exp(state.high - high)
    weights = jnp.where(visible, jnp.exp(logits - high), 0)
    weighted = jnp.einsum(
        "...QC,...CD->...QD",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    total = state.total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    return Softmax(high, total, state.values * shrink + weighted)


def _finish(state: Softmax, per_head: PerHead) -> Float[Array, "*dims H"]:
    """The weighted mean, the sinks among the weights; zeros where nothing was visible."""
    high = jnp.maximum(state.high, per_head.sinks)
    shrink = jnp.exp(state.high - high)
    total = state.total * shrink + jnp.exp(per_head.sinks - high)
    return state.values * (shrink * per_head.value_scale) / jnp.where(total > 0, total, 1)


def write_kv(
    pool: Real[Array, "P K S W"], kv: Real[Array, "T K W"], slots: Int32[Array, " T"]
) -> Real[Array, "P K S W"]:
    """The pool with each token's K|V row in its slot; in place where the caller donated it.

    Tokens of the null block are left out.
    """
    P, K, S, W = pool.shape
    T = slots.shape[0]
    # A scatter of whole rows into the flat pool: with the heads inside the window, XLA on a TPU
    # picks another layout for the pool and copies it, twice a layer.
    heads_K = jnp.arange(K)
    rows_TK = ((slots // S)[:, None] * K + heads_K[None, :]) * S + (slots % S)[:, None]
    # Only the null block's slots come twice. With distinct rows XLA stores; else, on a GPU, every
    # element of 16 or 8 bits is a compare-and-swap of the word that it shares with others.
    beyond_TK = P * K * S + jnp.arange(T * K).reshape(T, K)
    rows_TK = jnp.where((slots < S)[:, None], beyond_TK, rows_TK)
    flat = pool.reshape(P * K * S, W).at[rows_TK].set(kv, mode="drop", unique_indices=True)
    return flat.reshape(P, K, S, W)


def copy_blocks(
    pools: tuple[Real[Array, "P K S W"], ...], copies: Int32[Array, "X 2"], count: Int32[Array, ""]
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool after the first `count` of the (source, destination) copies, in order.

    In place where the caller donated the pools; the time follows `count`, not X.
    """

    def copy(i: Int32[Array, ""], pools: tuple[Array, ...]) -> tuple[Array, ...]:
        source, destination = copies[i]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                pool, jax.lax.dynamic_slice_in_dim(pool, source, 1), destination, 0
            )
            for pool in pools
        )

    return jax.lax.fori_loop(0, count, copy, pools)


def read_blocks(
    pools: tuple[Real[Array, "P K S W"], ...], block_ids: Int32[Array, " X"]
) -> Real[Array, "X L K S W"]:
    """Copies of whole blocks, all layers of each together."""
    return jnp.stack([pool.at[block_ids].get(mode="clip") for pool in pools], axis=1)


def write_blocks(
    pools: tuple[Real[Array, "P K S W"], ...],
    block_ids: Int32[Array, " X"],
    blocks: Real[Array, "X L K S W"],
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool with whole blocks put in; those for block id P are dropped.

    In place where the caller donated the pools. Other block ids are distinct.
    """
    P, X = pools[0].shape[0], block_ids.shape[0]
    block_ids = jnp.where(block_ids < P, block_ids, P + jnp.arange(X))  # distinct, as in `write_kv`
    return tuple(
        pool.at[block_ids].set(blocks[:, layer], mode="drop", unique_indices=True)
        for layer, pool in enumerate(pools)
    )
