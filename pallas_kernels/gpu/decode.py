"""Decode attention on a GPU: one query token a row, its context split over many programs.

README.md beside this file says why it is cut as it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.gpu.common import LOG2_E, check_arrays, head_scales, indices, nothing
from pallas_kernels.gpu.merge import merge
from pallas_kernels.gpu.splits import ceil_div, live_splits, max_splits
from pallas_kernels.gpu.tiles import DecodeConfig, choose_decode_config, padded_size
from pallas_kernels.layout import MASKED
from pallas_kernels.quantize import product_dtype


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
    config: DecodeConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row; a row of length 0 gives zeros.

    The token is the one at position `seq_lens - 1`, and its K and V are in the pool. Slots at and
    behind `seq_lens`, slots that have left the window and blocks that no row names may hold NaN.
    `config` says how the work is cut, by default as `choose_decode_config` finds. The query is
    rounded to the pool's dtype, or a pool of eight bits widened to the query's. ValueError for a
    dtype or a size that the kernel does not take.
    """
    check_arrays(q, pool)
    config = config or choose_decode_config(q, pool)
    num_splits = max_splits(block_tables.shape[1] * pool.shape[2], config.split_tokens, window)
    num_splits = max(num_splits, 1 if sinks is None else 2)  # the merge takes sinks in
    partials = _decode_call(
        q,
        pool,
        block_tables,
        seq_lens,
        kv_scales,
        num_splits=num_splits,
        config=config,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    if num_splits == 1:
        return partials[0].reshape(q.shape)
    values, highs, totals = partials
    return merge(
        values,
        highs,
        totals,
        seq_lens,
        sinks=sinks,
        split_tokens=config.split_tokens,
        window=window,
        dtype=q.dtype,
        interpret=interpret,
    )


def _decode_call(
    q: Float[Array, "B N H"],
    pool: Real[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    kv_scales: Float[Array, "2 K"] | None,
    *,
    num_splits: int,
    config: DecodeConfig,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> tuple[Array, ...]:
    """The result `[B, N, 1, H]` of a single split, else the values, high and total of each."""
    B, N, H = q.shape
    P, K, S, W = pool.shape
    programs = min(num_splits, pl.cdiv(config.num_programs, B * K))
    out_shape = [jax.ShapeDtypeStruct((B, N, num_splits, H), q.dtype)]
    if num_splits > 1:
        partial = jax.ShapeDtypeStruct((B, N, num_splits), jnp.float32)
        out_shape = [jax.ShapeDtypeStruct((B, N, num_splits, H), jnp.float32), partial, partial]
    kernel = functools.partial(
        _decode_kernel,
        num_kv_heads=K,
        block_size=S,
        has_scales=kv_scales is not None,
        config=config,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    partials = pl.pallas_call(
        kernel,
        name="paged_decode",
        grid=(B, K, programs),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(
        seq_lens,
        block_tables,
        q.astype(product_dtype(q, pool)),
        pool.reshape(P * K * S, W),
        *([] if kv_scales is None else [kv_scales.astype(jnp.float32)]),
    )
    return tuple(partials)


def _decode_kernel(
    seq_lens_ref,  # i32[B]
    block_tables_ref,  # i32[B, M]
    q_ref,  # [B, N, H]
    pool_ref,  # [P * K * S, W]
    *refs,  # f32[2, K], the scales of a pool of eight bits; then what is written:
    # o_ref, [B, N, X, H], the result or each split's weighted sum of values
    # f32[B, N, X], each split's highest logit and sum of weights, where there are several
    num_kv_heads: int,
    block_size: int,
    has_scales: bool,
    config: DecodeConfig,
    scale: float,
    window: int | None,
    soft_cap: float | None,
):
    """The queries of one KV head of one row against every so-manieth split of its context."""
    scale_refs, (o_ref, *partial_refs) = refs[:has_scales], refs[has_scales:]
    row, head, program = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_programs = pl.num_programs(2)
    _, N, H = q_ref.shape
    G, C = N // num_kv_heads, config.tile_tokens
    end = seq_lens_ref[row]
    start = 0 if window is None else jnp.maximum(end - window, 0)
    first_split, end_split = live_splits(end, config.split_tokens, window)
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    other = nothing(pool_ref.dtype)
    key_scale, value_scale = head_scales(scale, scale_refs, head)

    queries_G = jnp.arange(padded_size(G), dtype=jnp.int32)
    lanes_H = jnp.arange(padded_size(H), dtype=jnp.int32)
    tile_C = jnp.arange(C, dtype=jnp.int32)
    at_GH = indices(row, head * G + queries_G[:, None], lanes_H[None, :])
    real_G = queries_G < G
    real_GH = real_G[:, None] & (lanes_H < H)[None, :]
    q_GH = plt.load(q_ref.at[at_GH], mask=real_GH, other=0)

    def block_ids(tile):
        positions_C = tile * C + tile_C
        at_C = indices(row, jax.lax.div(positions_C, block_size))
        return plt.load(block_tables_ref.at[at_C], mask=positions_C < end, other=0)

    def absorb(tile, state):
        blocks_C, high_G, total_G, values_GH = state
        positions_C = tile * C + tile_C
        visible_C = positions_C < end
        if window is not None:
            visible_C &= positions_C >= start
        rows_C = (blocks_C * num_kv_heads + head) * block_size
        rows_C += jax.lax.rem(positions_C, block_size)
        # Unused slots may hold NaN, and zero times NaN is NaN: they are not even read.
        seen_CH = visible_C[:, None] & (lanes_H < H)[None, :]
        keys_at_CH = indices(rows_C[:, None], lanes_H[None, :])
        values_at_CH = indices(rows_C[:, None], H + lanes_H[None, :])
        keys_CH = plt.load(pool_ref.at[keys_at_CH], mask=seen_CH, other=other)
        logits_GC = jax.lax.dot_general(
            q_GH,
            keys_CH.astype(q_GH.dtype),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if soft_cap is None:
            logits_GC *= key_scale * LOG2_E
        else:
            logits_GC = soft_cap * (LOG2_E * jnp.tanh(logits_GC * (key_scale / soft_cap)))
        logits_GC = jnp.where(visible_C[None, :], logits_GC, MASKED)
        new_high_G = jnp.maximum(high_G, jnp.max(logits_GC, axis=1))
        shrink_G = jnp.exp2(high_G - new_high_G)
        weights_GC = jnp.exp2(logits_GC - new_high_G[:, None])
        values_CH = plt.load(pool_ref.at[values_at_CH], mask=seen_CH, other=other)
        weighted_GH = jax.lax.dot_general(
            weights_GC.astype(q_GH.dtype),
            values_CH.astype(q_GH.dtype),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        total_G = total_G * shrink_G + jnp.sum(weights_GC, axis=1)
        # The next tile's ids come with this tile: fetched with their own, they would stand in
        # line before the keys and values, and leave these a single buffer.
        next_blocks_C = block_ids(tile + 1)
        return next_blocks_C, new_high_G, total_G, values_GH * shrink_G[:, None] + weighted_GH

    def attend(split):
        """One split's highest logits, sums of weights and weighted values."""
        first_tile = jax.lax.div(jnp.maximum(split * config.split_tokens, start), C)
        end_tile = ceil_div(jnp.minimum((split + 1) * config.split_tokens, end), C)
        state = (
            block_ids(first_tile),
            jnp.full(queries_G.shape, MASKED, jnp.float32),
            jnp.zeros(queries_G.shape, jnp.float32),
            jnp.zeros(q_GH.shape, jnp.float32),
        )
        _, high_G, total_G, values_GH = jax.lax.fori_loop(first_tile, end_tile, absorb, state)
        return high_G, total_G, values_GH * value_scale if has_scales else values_GH

    if not partial_refs:
        _, total_G, values_GH = attend(first_split)
        values_GH /= jnp.where(total_G > 0, total_G, 1)[:, None]
        at_GH = indices(row, head * G + queries_G[:, None], 0, lanes_H[None, :])
        plt.store(o_ref.at[at_GH], values_GH.astype(o_ref.dtype), mask=real_GH)
        return

    high_ref, total_ref = partial_refs

    def attend_and_store(turn, _):
        place = program + turn * num_programs
        high_G, total_G, values_GH = attend(first_split + place)
        at_GH = indices(row, head * G + queries_G[:, None], place, lanes_H[None, :])
        plt.store(o_ref.at[at_GH], values_GH, mask=real_GH)
        at_G = indices(row, head * G + queries_G, place)
        plt.store(high_ref.at[at_G], high_G, mask=real_G)
        plt.store(total_ref.at[at_G], total_G, mask=real_G)

    # Splits are dealt out, not cut to the batch: how many programs share them changes no bit.
    num_mine = jnp.maximum(end_split - first_split - program + num_programs - 1, 0)
    turns = jax.lax.div(num_mine, num_programs)
    jax.lax.fori_loop(0, turns, attend_and_store, None)
