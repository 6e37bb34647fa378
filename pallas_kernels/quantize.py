"""Keys and values in eight bits: the scales of a pool, and the rows that go into it."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

# The largest magnitude that a pool's dtype keeps. int8 does without -128, so that a value and its
# opposite have the same error; float8_e4m3fn has no infinity: what is larger becomes NaN.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a pool of this dtype has scales."""
    return jnp.dtype(dtype).name in LARGEST


def product_dtype(q: Float[Array, "..."], pool: Real[Array, "P K S W"]) -> jnp.dtype:
    """What a matrix unit gets: the pool's dtype, or the query's, in which eight bits are exact."""
    return q.dtype if is_quantized(pool.dtype) else pool.dtype


def quantize(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_scales: Float[Array, "2 K"],
    dtype: DTypeLike,
) -> Real[Array, "T K W"]:
    """The K|V rows of a quantised pool: values by their head's scale, to the nearest, ties to even.

    Values beyond the largest that the dtype keeps become that one.
    """
    name = jnp.dtype(dtype).name
    scales_2K = kv_scales.astype(jnp.float32)
    scaled = [
        x.astype(jnp.float32) / scale_K[None, :, None]
        for x, scale_K in zip((k, v), scales_2K, strict=True)
    ]
    kv = jnp.clip(jnp.concatenate(scaled, axis=-1), -LARGEST[name], LARGEST[name])
    return (jnp.round(kv) if name == "int8" else kv).astype(dtype)


def kv_scales_of(
    k: Float[Array, "T K H"], v: Float[Array, "T K H"], dtype: DTypeLike
) -> Float[Array, "2 K"]:
    """The scales that bring each head's largest magnitude in these tokens to the dtype's largest.

    Row 0 is for keys, row 1 for values. None is 0, not even a silent head's.
    """
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise ValueError(
            f"a quantised pool is of {' or '.join(LARGEST)}, got {name}; another needs no scales"
        )
    largest_2K = jnp.stack([jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2)) for x in (k, v)])
    # The least normal number: processors that flush subnormals would find 0 in anything smaller.
    return jnp.maximum(largest_2K / LARGEST[name], jnp.finfo(jnp.float32).tiny)
