"""What every backend asks of its arguments; a backend adds its own limits.

Each check raises ValueError, which says what was expected and what came.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.layout import PagedBatch
from pallas_kernels.quantize import LARGEST, is_quantized

MIN_SCALE = 1e-6  # and its inverse: beyond, a masked logit is no longer the lowest


def check_attention(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> None:
    """The query, the pool, and the options."""
    _expect("q", q, ("T", "N", "H"), jnp.floating)
    check_pool(pool, kv_scales)
    _, N, H = q.shape
    _, K, S, W = pool.shape
    if W != 2 * H:
        raise ValueError(
            f"a pool row holds K and V, 2 x {H} lanes for this query, got {W}; "
            f"make the pool with pool_shape(head_size={H})"
        )
    if not K or N % K:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {N} and {K}; "
            "a query is [T, N, H] and a pool [P, K, S, 2H]"
        )
    if not S:
        raise ValueError(f"a block must have at least one slot, got a pool of {pool.shape}")
    if sinks is not None:
        _expect("sinks", sinks, (N,), jnp.floating)
    if not MIN_SCALE <= scale <= 1 / MIN_SCALE:
        raise ValueError(
            f"scale must be from {MIN_SCALE} to {1 / MIN_SCALE:g}, got {scale}; "
            "it is 1 / sqrt(head size) in most models"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 (the token itself), got {window}; None is no window"
        )
    float32 = jnp.finfo(jnp.float32)
    if soft_cap is not None and not float32.tiny <= soft_cap <= float32.max:
        raise ValueError(
            f"soft_cap must be positive and finite in float32, got {soft_cap}; None is no cap"
        )


def check_pool(pool: Real[Array, "P K S W"], kv_scales: Float[Array, "2 K"] | None) -> None:
    """The pool's dtype and its scales."""
    _expect("the pool", pool, ("P", "K", "S", "2H"))
    name, quantized = pool.dtype.name, is_quantized(pool.dtype)
    if not quantized and (pool.dtype.itemsize == 1 or not jnp.issubdtype(pool.dtype, jnp.floating)):
        raise ValueError(
            f"a pool is of floating point, or quantised as {' or '.join(LARGEST)}, got {name}; "
            "make it of one of these"
        )
    if quantized and kv_scales is None:
        raise ValueError(
            f"a pool of {name} needs kv_scales of shape (2, {pool.shape[1]}), got None; "
            "kv_scales_of finds them from keys and values"
        )
    if not quantized and kv_scales is not None:
        raise ValueError(
            f"kv_scales are for a pool of {' or '.join(LARGEST)}, got one of {name}; leave them out"
        )
    if kv_scales is not None:
        _expect("kv_scales", kv_scales, (2, pool.shape[1]), jnp.floating)


def check_rows(
    q: Float[Array, "B N H"], block_tables: Int32[Array, "B M"], seq_lens: Int32[Array, " B"]
) -> None:
    """A query, a block table and a length for each row."""
    B = q.shape[0]
    _expect("block_tables", block_tables, (B, "M"), jnp.int32)
    _expect("seq_lens", seq_lens, (B,), jnp.int32)
    _check_tables(block_tables)


def check_batch(q: Float[Array, "T N H"], batch: PagedBatch) -> None:
    """A ragged batch, and as many queries as it has rows at least."""
    _expect("block_tables", batch.block_tables, ("B", "M"), jnp.int32)
    _expect("query_starts", batch.query_starts, ("B + 1",), jnp.int32)
    _expect("seq_lens", batch.seq_lens, ("B",), jnp.int32)
    _expect("num_decodes", batch.num_decodes, (), jnp.int32)
    _check_tables(batch.block_tables)
    T, B = q.shape[0], batch.block_tables.shape[0]
    num_starts, num_lens = batch.query_starts.shape[0], batch.seq_lens.shape[0]
    if (num_starts, num_lens) != (B + 1, B):
        raise ValueError(
            f"a batch of {B} block tables needs {B + 1} query_starts and {B} seq_lens, "
            f"got {num_starts} and {num_lens}"
        )
    if T < B:
        raise ValueError(f"q must have a token for each of {B} rows, got {T}; pad its T axis")


def check_write(
    pool: Real[Array, "P K S W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, " T"],
    kv_scales: Float[Array, "2 K"] | None,
) -> None:
    """New keys and values for the pool, and where they go."""
    check_pool(pool, kv_scales)
    _, K, _, W = pool.shape
    _expect("slots", slots, ("T",), jnp.int32)
    for name, array in (("k", k), ("v", v)):
        _expect(name, array, (slots.shape[0], K, W // 2), jnp.floating)


def _check_tables(block_tables: Int32[Array, "B M"]) -> None:
    if 0 in block_tables.shape:
        raise ValueError(
            f"block_tables must have at least one row and one column, got {block_tables.shape}; "
            "a row of length 0 may stand for none"
        )


def _expect(name: str, array: Any, shape: tuple[int | str, ...], kind: Any = None) -> None:
    """The array has that shape, where a letter is any size, and a dtype of that kind."""
    fits = len(array.shape) == len(shape) and all(
        isinstance(size, str) or size == found
        for size, found in zip(shape, array.shape, strict=True)
    )
    if fits and (kind is None or jnp.issubdtype(array.dtype, kind)):
        return
    of = {jnp.floating: " of floating point", jnp.int32: " of int32"}.get(kind, "")
    raise ValueError(
        f"{name} must be [{', '.join(map(str, shape))}]{of}, "
        f"got {list(array.shape)} of {array.dtype}"
    )
