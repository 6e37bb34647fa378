"""Our kernels' probes, a function each: `benchmarks.tpu.probes:decode`.

The kernels' lengths are numbers here, which a trip count needs to be honoured; whatever else they
run is the code that runs in use.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu.probe import Probe, Work, kernel_alone
from pallas_kernels import pool_shape
from pallas_kernels.tpu import decode as decode_kernel

NUM_BLOCKS = 4096  # of the pool: how many hardly matters
ROWS = 2  # so that what a row fetches for the next one counts; more make the estimator slow


def decode(
    *,
    heads: tuple[int, int, int],
    context: int,
    rows: int = ROWS,
    block_size: int = 16,
    tile_tokens: int | None = None,
) -> Probe:
    """`paged_decode` of rows of `context` tokens, which must be whole tiles."""
    N, K, H = heads
    G = -(-N // K // decode_kernel.MIN_GROUP) * decode_kernel.MIN_GROUP
    shape = pool_shape(num_blocks=NUM_BLOCKS, num_kv_heads=K, block_size=block_size, head_size=H)
    pool: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    max_blocks = context // block_size
    tile_blocks = decode_kernel._default_tile_blocks(pool, max_blocks)
    if tile_tokens is not None:
        tile_blocks = tile_tokens // block_size
    tiles, left = divmod(context, tile_blocks * block_size)
    if left:
        raise ValueError(f"{context} tokens are no whole tiles of {tile_blocks} blocks")
    call = functools.partial(
        decode_kernel._decode_call,
        out_dtype=jnp.bfloat16,
        tile_blocks=tile_blocks,
        scale=H**-0.5,
        window=None,
        soft_cap=None,
        interpret=False,
        static_len=context,
    )
    arguments = (
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, 1, max_blocks), jnp.int32),
        jax.ShapeDtypeStruct((rows, K, G, shape[-1]), jnp.bfloat16),
        pool,
    )
    ideal_bytes = rows * context * K * 2 * H * 2
    function, operands = kernel_alone(call, arguments)
    work = Work(
        tiles=rows * tiles,
        rows=rows,
        kv_bytes=rows * context * K * shape[-1] * 2,
        ideal_bytes=ideal_bytes,
        flops=rows * context * N * 4 * H,
    )
    return Probe(function, operands, work)
