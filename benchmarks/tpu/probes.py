"""Our kernels' probes, a function each: `benchmarks.tpu.probes:decode`.

The kernels' lengths are numbers here, which a trip count needs to be honoured; whatever else they
run is the code that runs in use.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu.probe import Probe, Work, kernel_alone
from pallas_kernels import pool_shape
from pallas_kernels.tpu import decode as decode_kernel
from pallas_kernels.tpu import ragged as ragged_kernel
from pallas_kernels.tpu.device import num_cores
from pallas_kernels.tpu.softmax import head_lanes
from pallas_kernels.tpu.tiles import target_chip

NUM_BLOCKS = 4096  # of the pool: how many hardly matters
ROWS = 2  # so that what a row fetches for the next one counts; more make the estimator slow
ONE_ROW = ("tpu7x",)  # chips of whose copies the estimator loses track with two


def decode(
    *,
    heads: tuple[int, int, int],
    context: int,
    fitting: int | None = None,
    table_blocks: int | None = None,
    block_size: int = 16,
    dtype: str = "bfloat16",
    tile_blocks: int | None = None,
    ring: int = 3,
) -> Probe:
    """`paged_decode` of some rows a core, of `context` tokens, by default with its own tile.

    Contexts must be whole tiles; `fitting` is one that its own tile is chosen to fit. Tables are
    as wide as the context, or have `table_blocks` columns. The work is one core's.
    """
    N, K, H = heads
    rows = num_rows()
    all_rows = rows * num_cores(interpret=False)
    pool = abstract_pool(heads, block_size, dtype)
    q: Any = jax.ShapeDtypeStruct((all_rows, N, H), jnp.bfloat16)
    if tile_blocks is None:
        widest = table_blocks or (fitting or context) // block_size
        tile = decode_kernel.choose_tile(q, pool, widest)
    else:
        tile = decode_kernel.DecodeTile(blocks=tile_blocks, ring=ring)
    call = functools.partial(
        decode_kernel.paged_decode, scale=H**-0.5, tile=tile, static_len=context
    )
    arguments = (
        q,
        pool,
        jax.ShapeDtypeStruct((all_rows, table_blocks or context // block_size), jnp.int32),
        jax.ShapeDtypeStruct((all_rows,), jnp.int32),
    )
    function, operands = kernel_alone(call, arguments)
    kv_bytes = rows * context * K * 2 * H * pool.dtype.itemsize
    work = Work(
        tiles=rows * _whole_tiles(context, tile.blocks * block_size),
        rows=rows,
        kv_bytes=kv_bytes,
        ideal_bytes=kv_bytes,
        flops=rows * context * N * 4 * H,
    )
    return Probe(function, operands, work, dataclasses.asdict(tile))


def num_rows() -> int:
    """Of a decode probe, for a core of the chip compiled for."""
    return 1 if target_chip() in ONE_ROW else ROWS


def prefill(
    *,
    heads: tuple[int, int, int],
    context: int,
    queries: int,
    fitting: int | None = None,
    block_size: int = 16,
    dtype: str = "bfloat16",
    tile_tokens: int | None = None,
    tile_blocks: int | None = None,
    ring: int = 3,
) -> Probe:
    """One query tile of `paged_prefill`, all of whose tokens see the whole context.

    The kernel's loop over KV heads is inside its loop over tiles, which the estimator does not
    multiply: the probe has the heads of one turn, and `work.turns` says how many there are. The
    work is one core's, where cores share the heads.
    """
    N, K, H = heads
    G = N // K
    q: Any = jax.ShapeDtypeStruct((queries, N, H), jnp.bfloat16)
    tile = ragged_kernel.choose_tile(
        q, abstract_pool(heads, block_size, dtype), (fitting or context) // block_size
    )
    if tile_tokens is not None and tile_blocks is not None:
        tile = ragged_kernel.RaggedTile(tokens=tile_tokens, blocks=tile_blocks, ring=ring)
    cores = ragged_kernel.cores_of_heads(K, interpret=False)
    turn = ragged_kernel.heads_at_once(K // cores, G * tile.tokens * tile.blocks * block_size)
    pool = abstract_pool((turn * G, turn * cores, H), block_size, dtype)
    arguments = (
        jax.ShapeDtypeStruct((2, 5), jnp.int32),
        jax.ShapeDtypeStruct((2, 1, context // block_size), jnp.int32),
        jax.ShapeDtypeStruct((cores * turn * G, tile.tokens, head_lanes(2 * H)), jnp.bfloat16),
        pool,
    )
    function, operands = kernel_alone(_one_visit(tile, context, scale=H**-0.5), arguments)
    visits = -(-queries // tile.tokens)
    context_bytes = context * K // cores * 2 * H * pool.dtype.itemsize
    work = Work(
        tiles=_whole_tiles(context, tile.blocks * block_size),
        rows=1,
        kv_bytes=context_bytes * visits,
        ideal_bytes=context_bytes,
        flops=queries * context * N // cores * 4 * H,
        runs=visits,
        turns=K // cores // turn,
    )
    return Probe(function, operands, work, dataclasses.asdict(tile))


def _one_visit(
    tile: ragged_kernel.RaggedTile, context: int, *, scale: float
) -> Callable[..., jax.Array]:
    call = functools.partial(
        ragged_kernel.ragged_call,
        sinks=None,
        kv_scales=None,
        out_dtype=jnp.bfloat16,
        tile=tile,
        scale=scale,
        window=None,
        soft_cap=None,
        static_context=context,
        interpret=False,
    )
    return lambda visits, tables, q, pool: call(visits, 1, tables, q, pool)


def _whole_tiles(context: int, tile_tokens: int) -> int:
    tiles, left = divmod(context, tile_tokens)
    if left:
        raise ValueError(f"{context} tokens are no whole tiles of {tile_tokens}")
    return tiles


def abstract_pool(heads: tuple[int, int, int], block_size: int, dtype: str) -> Any:
    """A pool of NUM_BLOCKS for so many query heads, KV heads and head size."""
    _, K, H = heads
    shape = pool_shape(num_blocks=NUM_BLOCKS, num_kv_heads=K, block_size=block_size, head_size=H)
    return jax.ShapeDtypeStruct(shape, dtype)
