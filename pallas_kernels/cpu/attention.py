"""Attention of the `cpu` backend: `paged_attention.cc` as a JAX function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from pallas_kernels.cpu import build
from pallas_kernels.cpu.build import library
from pallas_kernels.layout import MASKED, PagedBatch

_POOLS = {  # what is compiled for which dtype: each when it is first needed
    "float32": "float",
    "bfloat16": "BFloat16",
    "int8": "int8_t",
    "float8_e4m3fn": "Float8",
}
NO_WINDOW = 2**31 - 1  # as many tokens as an int32 length can count
NO_SOFT_CAP = 0  # to the kernel; a caller's own 0 is refused before it comes here


@functools.cache
def register(pool_dtype: str) -> str:
    """The name by which XLA knows the kernel for such pools. Raises BuildError."""
    compiled = library("paged_attention.cc", f"KV={_POOLS[pool_dtype]}")
    target = f"jpaged_paged_attention_{pool_dtype}"
    build.register(compiled, "jpaged_paged_attention", target)
    return target


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
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch, decode rows and others alike.

    The kernel follows the numbers it is given, so it looks at them first: a start, a length or a
    block id that would lead outside the arrays fails the call with INVALID_ARGUMENT.
    """
    if pool.dtype.name not in _POOLS:
        raise ValueError(
            "the cpu backend needs a float32, bfloat16, int8 or float8_e4m3fn pool, "
            f"got {pool.dtype}; use xla"
        )
    N, K = q.shape[1], pool.shape[1]
    # Where there are none, what changes nothing. The kernel counts on these shapes.
    sinks = jnp.full(N, MASKED) if sinks is None else sinks.astype(jnp.float32).reshape(N)
    kv_scales = jnp.ones((2, K)) if kv_scales is None else kv_scales.astype(jnp.float32)
    # Under `vmap` calls follow one another: each one has all the threads already.
    attend = jax.ffi.ffi_call(
        register(pool.dtype.name),
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        vmap_method="sequential",
    )
    out = attend(
        q.astype(jnp.float32),
        pool,
        batch.block_tables,
        batch.query_starts,
        batch.seq_lens,
        jnp.maximum(sinks, MASKED),  # it knows no infinities
        kv_scales.reshape(2, K),
        scale=np.float32(scale),
        window=np.int64(NO_WINDOW if window is None else window),
        soft_cap=np.float32(NO_SOFT_CAP if soft_cap is None else soft_cap),
    )
    return out.astype(q.dtype)
