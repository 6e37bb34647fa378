"""New K and V into their slots on a GPU: the pool changes in place.

`dispatch` leaves this to XLA's scatter; the part `writes` of benchmarks/gpu_check.py times both.
From K and V in memory either is one kernel that reads them once and writes the rows once. But in a
step the scatter has the rotation within, so that K and V are stored in the pool alone, by one
kernel a layer; this kernel needs both in memory, and two more kernels put them there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.gpu.common import check_arrays, indices
from pallas_kernels.gpu.tiles import padded_size
from pallas_kernels.quantize import LARGEST

TILE_ELEMENTS = 1024  # of K, and as many of V: 16 bytes a thread in 16 bits
NUM_WARPS = 4


def write_kv(
    pool: Real[Array, "P K S W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, " T"],
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    interpret: bool = False,
) -> Real[Array, "P K S W"]:
    """The pool with each token's K and V in slot `block * S + offset`, in place if donated.

    Slots are distinct. Tokens of the null block are left out, as are those whose block the pool
    does not have. ValueError for a dtype or a size that the kernel does not take.
    """
    check_arrays(k, pool)
    P, K, S, W = pool.shape
    T, _, H = k.shape
    rows = max(1, TILE_ELEMENTS // padded_size(H))
    written = pl.pallas_call(
        functools.partial(_write_kernel, num_heads=K, block_size=S, tile_rows=rows),
        name="write_kv",
        grid=(pl.cdiv(T * K, rows),),
        out_shape=jax.ShapeDtypeStruct((P * K * S, W), pool.dtype),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(
        slots,
        k.reshape(T * K, H),
        v.reshape(T * K, H),
        pool.reshape(P * K * S, W),
        *([] if kv_scales is None else [kv_scales.astype(jnp.float32)]),
    )
    return written.reshape(P, K, S, W)


def _write_kernel(
    slots_ref,  # i32[T]
    k_ref,  # [T * K, H]
    v_ref,  # [T * K, H]
    _,  # the pool before, which is `pool_ref`
    *refs,  # f32[2, K], the scales of a pool of eight bits; then pool_ref, [P * K * S, W]
    num_heads: int,
    block_size: int,
    tile_rows: int,
):
    """A few rows, each one token's K and V of one head."""
    *scales_refs, pool_ref = refs
    num_rows, H = k_ref.shape
    num_slots = pool_ref.shape[0] // num_heads
    rows_R = pl.program_id(0) * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
    lanes_H = jnp.arange(padded_size(H), dtype=jnp.int32)
    tokens_R, heads_R = jax.lax.div(rows_R, num_heads), jax.lax.rem(rows_R, num_heads)
    slots_R = plt.load(slots_ref.at[indices(tokens_R)], mask=rows_R < num_rows, other=0)
    live_R = (slots_R >= block_size) & (slots_R < num_slots)  # the null block's come before
    blocks_R, offsets_R = jax.lax.div(slots_R, block_size), jax.lax.rem(slots_R, block_size)
    pool_rows_R = (blocks_R * num_heads + heads_R) * block_size + offsets_R
    live_RH = live_R[:, None] & (lanes_H < H)[None, :]
    for part, ref in enumerate((k_ref, v_ref)):
        at_RH = indices(rows_R[:, None], lanes_H[None, :])
        values_RH = plt.load(ref.at[at_RH], mask=live_RH, other=0.0)
        if scales_refs:
            at_R = indices(part, heads_R)
            scales_R = plt.load(scales_refs[0].at[at_R])
            values_RH = _quantize(values_RH.astype(jnp.float32) / scales_R[:, None], pool_ref.dtype)
        at_RH = indices(pool_rows_R[:, None], part * H + lanes_H[None, :])
        plt.store(pool_ref.at[at_RH], values_RH.astype(pool_ref.dtype), mask=live_RH)


def _quantize(values: Float[Array, "R H"], dtype: DTypeLike) -> Float[Array, "R H"]:
    """What `quantize` of the layer above makes of scaled values, before the cast."""
    name = jnp.dtype(dtype).name
    values = jnp.clip(values, -LARGEST[name], LARGEST[name])
    return _round(values) if name == "int8" else values


def _round(values: Float[Array, "R H"]) -> Float[Array, "R H"]:
    """To the nearest integer, ties to even: Pallas has no `round` for Triton."""
    low = jnp.floor(values)
    rest = values - low
    is_odd = (low.astype(jnp.int32) & 1) == 1
    return jnp.where((rest > 0.5) | ((rest == 0.5) & is_odd), low + 1, low)
