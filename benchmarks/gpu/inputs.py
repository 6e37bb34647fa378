"""Random pools, tables and caches on the device, and what attention over them must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int32

from pallas_kernels import pool_shape


def random_key(seed: int) -> jax.Array:
    """A key of the generator that fills gigabytes in no time."""
    return jax.random.key(seed, impl="unsafe_rbg")


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Standard normal values."""
    return jax.random.normal(key, shape, dtype)


def random_arrays(seed: int, shape: tuple[int, ...], count: int, dtype: DTypeLike) -> list:
    """Several of one shape, all different."""
    return [random_array(random_key(seed + i), shape, dtype) for i in range(count)]


def paged_shape(
    heads: tuple[int, int, int], rows: int, context: int, block_size: int
) -> tuple[int, int, int, int]:
    """The pool that holds `rows` contexts, and the null block."""
    _, K, H = heads
    num_blocks = 1 + rows * -(-context // block_size)
    return pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)


def shuffled_tables(seed: int, rows: int, context: int, block_size: int) -> np.ndarray:
    """Every block but the null block, in random order, a row's worth to each row."""
    columns = -(-context // block_size)
    ids = np.random.default_rng(seed).permutation(rows * columns) + 1
    return ids.reshape(rows, columns).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("scale",))
def attention_of_row(
    q: Float[Array, "T N H"], kv: Float[Array, "K C W"], length: Int32[Array, ""], *, scale: float
) -> Float[Array, "T N H"]:
    """The last T of `length` tokens, dense, in float32 with the most exact products there are.

    It checks single rows of pools that are too large for the host, where `oracle.py` works.
    """
    T, N, H = q.shape
    K, C, _ = kv.shape
    kv = kv.astype(jnp.float32)
    q_TKGH = q.reshape(T, K, N // K, H).astype(jnp.float32)
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    logits = exact("TKGH,KCH->TKGC", q_TKGH, kv[..., :H]) * scale
    visible_TC = jnp.arange(C)[None, :] <= (length - T + jnp.arange(T))[:, None]
    weights = jax.nn.softmax(jnp.where(visible_TC[:, None, None, :], logits, -jnp.inf))
    return exact("TKGC,KCH->TKGH", weights, kv[..., H:]).reshape(T, N, H)


@jax.jit
def row_of_pool(pool: Float[Array, "P K S W"], table: Int32[Array, " M"]) -> Float[Array, "K C W"]:
    """One row's keys and values in order."""
    _, K, _, W = pool.shape
    return jnp.moveaxis(pool[table], 1, 0).reshape(K, -1, W)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected; infinite where not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
