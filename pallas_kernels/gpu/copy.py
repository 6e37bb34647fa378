"""Copies of whole blocks in every layer's pool, in place: one kernel for any number of copies.

XLA's loop over copies has a trip count that only the device knows. Compiled for an H100 it is a
`while` outside any CUDA graph: each turn, and once more at the end, the host starts a comparison
and waits for its result. A turn is a graph of L + 2 kernels for L layers, and each block goes
through a temporary: it is read twice and written twice. Here it is read once and written once, and
the host waits for nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32, Real

from pallas_kernels.gpu.common import check_pool, indices

TILE_BYTES = 4 << 10  # at most, and a power of two: 32 bytes a thread, two loads on their way
NUM_WARPS = 4


def copy_blocks(
    pools: tuple[Real[Array, "P K S W"], ...],
    copies: Int32[Array, "X 2"],
    count: Int32[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool after the first `count` of the (source, destination) copies, in order.

    In place where the caller donated the pools; the time follows `count`, not X.
    """
    check_pool(pools[0])
    P, K, S, W = pools[0].shape
    tile = math.gcd(K * S * W, TILE_BYTES // pools[0].dtype.itemsize)
    flat = [pool.reshape(P, K * S * W) for pool in pools]
    copied = pl.pallas_call(
        functools.partial(_copy_kernel, tile=tile),
        name="copy_blocks",
        grid=(len(pools), K * S * W // tile),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in flat],
        input_output_aliases={2 + layer: layer for layer in range(len(pools))},
        # With more stages the compiler may load a source before the copy that makes it.
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
    )(count, copies, *flat)
    return tuple(pool.reshape(P, K, S, W) for pool in copied)


def _copy_kernel(
    count_ref,  # i32[]
    copies_ref,  # i32[X, 2]
    *refs,  # [P, K * S * W] each: the layers' pools before, and the same memory after
    tile: int,
):
    """One piece of every block that moves in one layer.

    The same program does that piece of all copies, one after the other: what one copy writes and a
    later one reads never leaves the program, or even the thread, so no program waits for another.
    """
    num_layers = len(refs) // 2
    layer, piece = pl.program_id(0), pl.program_id(1)
    lanes = piece * tile + jnp.arange(tile, dtype=jnp.int32)

    def copy_all(pool_ref):
        def copy(place, _):
            source, destination = copies_ref[place, 0], copies_ref[place, 1]
            values = plt.load(pool_ref.at[indices(source, lanes)])
            plt.store(pool_ref.at[indices(destination, lanes)], values)

        jax.lax.fori_loop(0, count_ref[()], copy, None)

    for place, pool_ref in enumerate(refs[num_layers:]):
        pl.when(layer == place)(functools.partial(copy_all, pool_ref))
