"""Puts the splits of a context together: their partial results become a row's attention."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.common import absorb_sinks
from pallas_kernels.gpu.mosaic.common import (
    COMPILER_PARAMS,
    ROWS,
    by_rows,
    full_rows,
    named,
    plgpu,
    simulator,
    zero_matrix,
)
from pallas_kernels.gpu.splits import live_splits
from pallas_kernels.layout import MASKED

STAGES = 2  # splits in shared memory, one of them under way


def merge(
    values: Float[Array, "B K X G H"],
    stats: Float[Array, "B K X 2 R"],
    seq_lens: Int32[Array, " B"],
    *,
    sinks: Float[Array, " N"] | None,
    split_tokens: int,
    window: int | None,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """The attention whose partial results these are, one for each split with a visible token.

    `stats` has each split's highest logit, in base 2, and its sum of weights, without the sinks';
    only the first G of a KV head are real. What lies behind a row's last split is not read; a row
    of length 0 gives zeros.
    """
    B, K, _, G, H = values.shape
    R = stats.shape[-1]
    more = []
    if sinks is not None:
        more = [jnp.pad(sinks.astype(jnp.float32).reshape(K, G), ((0, 0), (0, R - G)))]
    out = plgpu.kernel(
        named(_merge_splits_kernel, split_tokens=split_tokens, window=window),
        out_type=jax.ShapeDtypeStruct((B, K, G, H), dtype),
        grid=(B, K),
        grid_names=("row", "head"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "values_smem": plgpu.SMEM((STAGES, R, H), jnp.float32),
            "stats_smem": plgpu.SMEM((STAGES, 2, R), jnp.float32),
            "sinks_smem": plgpu.SMEM((R,), jnp.float32),
            "out_smem": plgpu.SMEM((R, H), dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "sinks_full": plgpu.Barrier(),
        },
        compiler_params=COMPILER_PARAMS,
        interpret=simulator(interpret),
    )(seq_lens, values, stats, *more)
    return out.reshape(B, K * G, H)


def _merge_splits_kernel(
    seq_lens_ref,  # i32[B]
    values_ref,  # f32[B, K, X, G, H]
    stats_ref,  # f32[B, K, X, 2, R]
    *refs,  # f32[K, R], the sinks, where there are any; then o_ref, [B, K, G, H]
    values_smem,
    stats_smem,
    sinks_smem,
    out_smem,
    full,
    sinks_full,
    split_tokens: int,
    window: int | None,
):
    """The query heads of one KV head of one row, a split a turn, under an online softmax."""
    *sinks_refs, o_ref = refs
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    G, (R, H) = o_ref.shape[2], out_smem.shape
    first, end = live_splits(seq_lens_ref[row], split_tokens, window)
    num_splits = end - first
    if sinks_refs:
        plgpu.copy_gmem_to_smem(sinks_refs[0].at[head], sinks_smem, sinks_full)

    def fetch(place):
        @pl.when(place < num_splits)
        def copy():
            slot = jax.lax.rem(place, jnp.int32(STAGES))
            values, stats = values_ref.at[row, head, place], stats_ref.at[row, head, place]
            plgpu.copy_gmem_to_smem(values, values_smem.at[slot, pl.ds(0, G)], full.at[slot])
            plgpu.copy_gmem_to_smem(stats, stats_smem.at[slot], full.at[slot])

    def absorb(place, state):
        high_R, total_R, values_RH = state
        fetch(place + STAGES - 1)
        slot = jax.lax.rem(place, jnp.int32(STAGES))
        plgpu.barrier_wait(full.at[slot])
        split_high_R = plgpu.load(stats_smem.at[slot, 0], layout=ROWS)
        split_total_R = plgpu.load(stats_smem.at[slot, 1], layout=ROWS)
        split_values_RH = plgpu.load(values_smem.at[slot], layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()  # the next copy to this place comes after
        new_high_R = jnp.maximum(high_R, split_high_R)
        shrink_R, weight_R = jnp.exp2(high_R - new_high_R), jnp.exp2(split_high_R - new_high_R)
        total_R = total_R * shrink_R + split_total_R * weight_R
        values_RH = values_RH * by_rows(shrink_R, H) + split_values_RH * by_rows(weight_R, H)
        return new_high_R, total_R, values_RH

    for place in range(STAGES - 1):
        fetch(jnp.int32(place))
    state = full_rows(R, MASKED), full_rows(R, 0.0), zero_matrix((R, H))
    high_R, total_R, values_RH = jax.lax.fori_loop(0, num_splits, absorb, state)
    if sinks_refs:
        plgpu.barrier_wait(sinks_full)
        sinks_R = plgpu.load(sinks_smem, layout=ROWS)
        total_R, shrink_R = absorb_sinks(sinks_R, high_R, total_R)
        values_RH *= by_rows(shrink_R, H)
    total_R = jnp.where(total_R > 0, total_R, 1)
    out_smem[...] = (values_RH / by_rows(total_R, H)).astype(out_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, G)], o_ref.at[row, head])
    plgpu.wait_smem_to_gmem(0)
