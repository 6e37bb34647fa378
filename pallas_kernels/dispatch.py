"""The three jobs, each given to the backend that was asked for."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels import reference, xla
from pallas_kernels.backends import GPU_BACKENDS, MOSAIC_BACKENDS, TPU_BACKENDS, Backend
from pallas_kernels.checks import check_attention, check_batch, check_rows, check_write
from pallas_kernels.cpu import attention as cpu
from pallas_kernels.cpu import pool as cpu_pool
from pallas_kernels.gpu import copy as gpu_copy
from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.gpu import ragged as gpu_ragged
from pallas_kernels.gpu.mosaic import limits as mosaic_limits
from pallas_kernels.layout import PagedBatch, decode_batch
from pallas_kernels.quantize import quantize
from pallas_kernels.tpu import decode as tpu_decode
from pallas_kernels.tpu import ragged as tpu_ragged
from pallas_kernels.tpu import write as tpu_write


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
    backend: Backend,
) -> Float[Array, "B N H"]:
    """Attention over the pool of one query token a row, the token at position `seq_lens - 1`.

    Its K and V are in the pool already. A row of length 0 is padding and gives zeros. With
    `window`, a token sees itself and the `window - 1` before it; with `soft_cap`, logits pass
    through `soft_cap * tanh(logits / soft_cap)`.

    `sinks` are logits, one for each query head, that take weight and bring no value: a head's
    weights are `exp(logits) / (sum(exp(logits)) + exp(sink))`. They are neither scaled nor capped.
    gpt-oss learns them (its model card, arXiv 2508.10925); attention sinks are from StreamingLLM
    (arXiv 2309.17453).

    A pool of int8 or float8_e4m3fn needs `kv_scales`, for keys in row 0 and for values in row 1:
    what stands in the pool, times its head's scale, is the key or the value.
    """
    options = _given(
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, kv_scales=kv_scales
    )
    check_attention(q, pool, **options)
    check_rows(q, block_tables, seq_lens)
    if backend in TPU_BACKENDS:
        return tpu_decode.paged_decode(
            q, pool, block_tables, seq_lens, interpret=backend.is_interpreted, **options
        )
    if backend in GPU_BACKENDS:
        return gpu_decode.paged_decode(
            q, pool, block_tables, seq_lens, interpret=backend.is_interpreted, **options
        )
    if backend in MOSAIC_BACKENDS:
        return _mosaic("paged_decode", backend, q, pool)(q, pool, block_tables, seq_lens, **options)
    if backend is Backend.XLA:
        return xla.paged_decode(q, pool, block_tables, seq_lens, **options)
    batch = decode_batch(block_tables, seq_lens)
    return paged_attention(q, pool, batch, backend=backend, **options)


def paged_attention(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    backend: Backend,
) -> Float[Array, "T N H"]:
    """Causal attention over the pool of a ragged batch (`PagedBatch` says how it is laid out).

    The T axis is at least as long as the B axis. Where no kernel takes ragged rows, rows of one
    token go to `paged_decode`'s, which says what the options are.
    """
    options = _given(
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, kv_scales=kv_scales
    )
    check_attention(q, pool, **options)
    check_batch(q, batch)
    if backend in (Backend.REFERENCE, Backend.CPU):
        module = reference if backend is Backend.REFERENCE else cpu
        return module.paged_attention(q, pool, batch, **options)
    B = batch.seq_lens.shape[0]
    decode_lens = jnp.where(jnp.arange(B) < batch.num_decodes, batch.seq_lens, 0)
    decoded = paged_decode(q[:B], pool, batch.block_tables, decode_lens, backend=backend, **options)
    if backend in GPU_BACKENDS:
        return gpu_ragged.paged_prefill(
            q, pool, batch, decoded, interpret=backend.is_interpreted, **options
        )
    if backend in TPU_BACKENDS:
        return tpu_ragged.paged_prefill(
            q, pool, batch, decoded, interpret=backend.is_interpreted, **options
        )
    if backend in MOSAIC_BACKENDS:
        return _mosaic("paged_prefill", backend, q, pool)(q, pool, batch, decoded, **options)
    return xla.paged_prefill(q, pool, batch, decoded, **options)


def write_kv(
    pool: Real[Array, "P K S W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, " T"],
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    backend: Backend,
) -> Real[Array, "P K S W"]:
    """The pool with each token's K and V in slot `block * S + offset`.

    Several tokens may name the null block, which then holds anything; other slots are distinct. A
    quantised pool gets them by `kv_scales` (`paged_decode` says which), rounded to the nearest and
    cut to what its dtype keeps.
    """
    check_write(pool, k, v, slots, kv_scales)
    if backend is Backend.CPU and kv_scales is None:
        return cpu_pool.write_kv(pool, k.astype(pool.dtype), v.astype(pool.dtype), slots)
    if kv_scales is None:
        kv = jnp.concatenate([k, v], axis=-1).astype(pool.dtype)
    else:
        kv = quantize(k, v, kv_scales, pool.dtype)
    if backend in TPU_BACKENDS:
        return tpu_write.write_kv(pool, kv, slots, interpret=backend.is_interpreted)
    module = reference if backend is Backend.REFERENCE else xla
    return module.write_kv(pool, kv, slots)


def copy_blocks(
    pools: tuple[Real[Array, "P K S W"], ...],
    copies: Int32[Array, "X 2"],
    count: Int32[Array, ""],
    *,
    backend: Backend,
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool after the first `count` of the (source, destination) block copies.

    They are done in order: a destination may have been the source of a copy before it.
    """
    if backend in (*GPU_BACKENDS, *MOSAIC_BACKENDS):
        return gpu_copy.copy_blocks(pools, copies, count, interpret=backend.is_interpreted)
    module = cpu_pool if backend is Backend.CPU else xla
    return module.copy_blocks(pools, copies, count)


def write_blocks(
    pools: tuple[Real[Array, "P K S W"], ...],
    block_ids: Int32[Array, " X"],
    blocks: Real[Array, "X L K S W"],
    *,
    backend: Backend,
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool with whole blocks put in; those for block id P are dropped.

    In place where the caller donated the pools. Other block ids are distinct.
    """
    module = cpu_pool if backend is Backend.CPU else xla
    return module.write_blocks(pools, block_ids, blocks)


def _mosaic(
    job: str, backend: Backend, q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]
) -> Callable[..., Any]:
    """A kernel that takes these arrays."""
    mosaic_limits.check_arrays(q, pool, interpreted=backend.is_interpreted)
    # Not before it is asked for: an older JAX does not have what it imports.
    from pallas_kernels.gpu.mosaic import decode, prefill

    kernels = {"paged_decode": decode.paged_decode, "paged_prefill": prefill.paged_prefill}
    return functools.partial(kernels[job], interpret=backend.is_interpreted)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None, which is every backend's default: it may lack what nobody asks."""
    return {name: value for name, value in options.items() if value is not None}
