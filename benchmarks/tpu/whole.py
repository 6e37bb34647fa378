"""The whole attention kernels for a tile of the table, to be compiled, or run where a TPU is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedBatch, pool_shape
from pallas_kernels.tpu import DecodeTile, RaggedTile, paged_decode, paged_prefill

CONTEXT = 4096
ROWS = 16  # of decodes; a prompt is alone
QUERIES = 512  # the last tokens of a prompt's context

Build = tuple[Callable[..., Any], tuple[Any, ...]]


def plain(
    *,
    kernel: str,
    heads: tuple[int, int, int],
    dtype: str,
    block_size: int,
    tile: dict[str, int] | None,
    **options: Any,
) -> Build:
    """The kernel and its abstract arguments; without a tile, with its own choice."""
    N, K, H = heads
    is_decode = kernel == "decode"
    rows = ROWS if is_decode else 1
    shape = pool_shape(
        num_blocks=1 + rows * CONTEXT // block_size,
        num_kv_heads=K,
        block_size=block_size,
        head_size=H,
    )
    pool = _spec(dtype, *shape)
    tables, lens = _spec(jnp.int32, rows, CONTEXT // block_size), _spec(jnp.int32, rows)
    if is_decode:
        cut = None if tile is None else DecodeTile(**tile)
        call = functools.partial(paged_decode, scale=H**-0.5, tile=cut, **options)
        return call, (_spec(jnp.bfloat16, rows, N, H), pool, tables, lens)
    cut = None if tile is None else RaggedTile(**tile)
    call = functools.partial(paged_prefill, scale=H**-0.5, tile=cut, **options)
    batch = PagedBatch(tables, _spec(jnp.int32, rows + 1), lens, _spec(jnp.int32))
    decoded = _spec(jnp.bfloat16, rows, N, H)
    return call, (_spec(jnp.bfloat16, QUERIES, N, H), pool, batch, decoded)


def with_every_option(*, heads: tuple[int, int, int], dtype: str, **fields: Any) -> Build:
    """The same with all that asks for more VMEM: a tile must fit every model of its heads."""
    N, K, _ = heads
    call, arguments = plain(heads=heads, dtype=dtype, **fields)

    def attend(*arrays: Any) -> Any:
        scales = jnp.ones((2, K)) if jnp.dtype(dtype).itemsize == 1 else None
        options = {"window": CONTEXT // 2, "soft_cap": 30.0, "sinks": jnp.zeros(N)}
        return call(*arrays, **options, kv_scales=scales)

    return attend, arguments


def filled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays for the arguments of `plain`: contexts of CONTEXT tokens in blocks of any order."""
    rng = np.random.default_rng(0)
    q, pool = (
        jnp.asarray(rng.standard_normal(array.shape, "f4")).astype(array.dtype)
        for array in arguments[:2]
    )
    blocks = 1 + rng.permutation(pool.shape[0] - 1)
    if isinstance(arguments[2], PagedBatch):
        tables = jnp.asarray(blocks.reshape(arguments[2].block_tables.shape), jnp.int32)
        starts, lens = jnp.array([0, QUERIES], jnp.int32), jnp.array([CONTEXT], jnp.int32)
        decoded = jnp.zeros(arguments[3].shape, arguments[3].dtype)
        return q, pool, PagedBatch(tables, starts, lens, jnp.int32(0)), decoded
    tables = jnp.asarray(blocks.reshape(arguments[2].shape), jnp.int32)
    return q, pool, tables, jnp.full(arguments[3].shape, CONTEXT, jnp.int32)


def _spec(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
