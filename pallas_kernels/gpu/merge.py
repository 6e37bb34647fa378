"""Puts the splits of a context together: their partial results become a row's attention."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.common import absorb_sinks, indices
from pallas_kernels.gpu.splits import ceil_div, live_splits
from pallas_kernels.gpu.tiles import padded_size
from pallas_kernels.layout import MASKED

# Fixed, so that the order of a row's sums does not follow the width of its table.
MERGED_SPLITS = 8


def merge(
    values: Float[Array, "B N X H"],
    highs: Float[Array, "B N X"],
    totals: Float[Array, "B N X"],
    seq_lens: Int32[Array, " B"],
    *,
    sinks: Float[Array, " N"] | None = None,
    split_tokens: int,
    window: int | None,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """The attention whose partial results these are, one for each split with a visible token.

    Highest logits are in base 2, `sinks` are not; values are weighted sums under the former, totals
    the sums of weights, without the sinks'.
    What lies behind a row's last split is not read; a row of length 0 gives zeros.
    """
    B, N, _, H = values.shape
    return pl.pallas_call(
        functools.partial(_merge_kernel, split_tokens=split_tokens, window=window),
        name="merge_splits",
        grid=(B, N),
        out_shape=jax.ShapeDtypeStruct((B, N, H), dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
    )(seq_lens, values, highs, totals, *([] if sinks is None else [sinks]))


def _merge_kernel(
    seq_lens_ref,  # i32[B]
    values_ref,  # f32[B, N, X, H]
    highs_ref,  # f32[B, N, X]
    totals_ref,  # f32[B, N, X]
    *refs,  # [N], the sinks, where there are any; then o_ref, [B, N, H]
    split_tokens: int,
    window: int | None,
):
    """One query head of one row, a few splits a turn, under an online softmax."""
    *sinks_refs, o_ref = refs
    row, head = pl.program_id(0), pl.program_id(1)
    H = o_ref.shape[2]
    first_split, end_split = live_splits(seq_lens_ref[row], split_tokens, window)
    num_splits = end_split - first_split
    lanes_H = jnp.arange(padded_size(H), dtype=jnp.int32)

    def absorb(turn, state):
        high, total, values_H = state
        splits_X = turn * MERGED_SPLITS + jnp.arange(MERGED_SPLITS, dtype=jnp.int32)
        live_X = splits_X < num_splits
        at_X = indices(row, head, splits_X)
        highs_X = plt.load(highs_ref.at[at_X], mask=live_X, other=MASKED)
        totals_X = plt.load(totals_ref.at[at_X], mask=live_X, other=0.0)
        at_XH = indices(row, head, splits_X[:, None], lanes_H[None, :])
        seen_XH = live_X[:, None] & (lanes_H < H)[None, :]
        values_XH = plt.load(values_ref.at[at_XH], mask=seen_XH, other=0.0)
        new_high = jnp.maximum(high, jnp.max(highs_X))
        shrink = jnp.exp2(high - new_high)
        weights_X = jnp.exp2(highs_X - new_high)
        total = total * shrink + jnp.sum(weights_X * totals_X)
        values_H = values_H * shrink + jnp.sum(weights_X[:, None] * values_XH, axis=0)
        return new_high, total, values_H

    zeros_H = jnp.zeros(lanes_H.shape, jnp.float32)
    state = (jnp.float32(MASKED), jnp.float32(0), zeros_H)
    turns = ceil_div(num_splits, MERGED_SPLITS)
    high, total, values_H = jax.lax.fori_loop(0, turns, absorb, state)
    if sinks_refs:
        total, shrink = absorb_sinks(sinks_refs[0][head], high, total)
        values_H *= shrink
    out_H = values_H / jnp.where(total > 0, total, 1)
    plt.store(o_ref.at[indices(row, head, lanes_H)], out_H.astype(o_ref.dtype), mask=lanes_H < H)
