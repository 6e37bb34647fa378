"""Decode attention on a TPU: one query token a row, blocks fetched through the row's table.

pallas_kernels/README.md draws the algorithm.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.layout import MASKED

NUM_BUFFERS = 2  # one tile is computed on while the next one arrives
MIN_GROUP = 8  # queries of a head, padded: a register has 8 sublanes
MAX_TILE_TOKENS = 512  # fewer in flight and the latency of a copy shows
MAX_TILE_BYTES = 2 << 20  # NUM_BUFFERS of them, queries and results fit the 16 MiB of a v5e program
LANES = 128


def paged_decode(
    q: Float[Array, "B N H"],
    pool: Float[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tile_blocks: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row; a row of length 0 gives zeros.

    The token is the one at position `seq_lens - 1`, and its K and V are in the pool. Slots at and
    behind `seq_lens`, slots that have left the window and blocks that no row names may hold NaN.
    `tile_blocks` blocks are fetched and computed on at a time, by default as many as fit well.
    With `interpret` a TPU is simulated on whatever device there is, as `InterpretParams` say.
    """
    _check(pool, tile_blocks)
    B, N, H = q.shape
    _, K, _, W = pool.shape
    G = N // K
    # Widened by zeros to the pool's lanes: its product with a row of K|V is then q.k.
    q_BNW = jnp.pad(q.astype(pool.dtype), [(0, 0), (0, 0), (0, W - H)])
    q_BKGW = q_BNW.reshape(B, K, G, W)
    q_BKGW = jnp.pad(q_BKGW, [(0, 0), (0, 0), (0, -G % MIN_GROUP), (0, 0)])
    out_BKGW = _decode_call(
        seq_lens,
        block_tables[:, None, :],
        q_BKGW,
        pool,
        out_dtype=q.dtype,
        tile_blocks=tile_blocks or _default_tile_blocks(pool, block_tables.shape[1]),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
    )
    return out_BKGW[:, :, :G, H:].reshape(B, N, H)


def _check(pool: Float[Array, "P K S W"], tile_blocks: int | None) -> None:
    """What this kernel asks beyond what `dispatch` asked for every backend."""
    S = pool.shape[2]
    if S % MIN_GROUP:
        raise ValueError(f"block size must be a multiple of {MIN_GROUP}, got {S}; or use `xla`")
    if pool.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"the pool must be bfloat16 or float32, got {pool.dtype}; use `xla`")
    if tile_blocks is not None and tile_blocks < 1:
        raise ValueError(f"tile_blocks must be at least 1, got {tile_blocks}; None picks a size")


def _default_tile_blocks(pool: Float[Array, "P K S W"], max_blocks: int) -> int:
    """Blocks of a tile, in whole registers of logits where they fit; no longer than a table."""
    _, K, S, W = pool.shape
    block_bytes = K * S * max(W, LANES) * pool.dtype.itemsize
    blocks = min(MAX_TILE_BYTES // block_bytes, MAX_TILE_TOKENS // S)
    unit = max(1, LANES // S)
    blocks = min(blocks, pl.cdiv(max_blocks, unit) * unit)
    return max(1, blocks // unit * unit if blocks >= unit else blocks)


def _decode_call(
    seq_lens: Int32[Array, " B"],
    block_tables: Int32[Array, "B 1 M"],
    q: Float[Array, "B K G W"],
    pool: Float[Array, "P K S W"],
    *,
    out_dtype: jnp.dtype,
    tile_blocks: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool | pltpu.InterpretParams,
    static_len: int | None = None,
) -> Float[Array, "B K G W"]:
    """The kernel over a grid of rows; the pool stays where it is, a row's table comes to SMEM.

    `static_len` is for the compiler's estimates only, which need trip counts: the tokens of every
    row, a multiple of a tile's.
    """
    B, K, G, W = q.shape
    S, M = pool.shape[2], block_tables.shape[2]
    heads = pl.BlockSpec((None, K, G, W), lambda row: (row, 0, 0, 0))
    kernel = functools.partial(
        _decode_kernel, scale=scale, window=window, soft_cap=soft_cap, static_len=static_len
    )
    return pl.pallas_call(
        kernel,
        name="paged_decode",
        grid=(B,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            # The whole table would not fit the 1 MiB of SMEM at 256 rows of 1024 blocks.
            pl.BlockSpec((None, 1, M), lambda row: (row, 0, 0), memory_space=pltpu.SMEM),
            heads,
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=heads,
        out_shape=jax.ShapeDtypeStruct(q.shape, out_dtype),
        scratch_shapes=[
            pltpu.VMEM((NUM_BUFFERS, K, tile_blocks * S, W), pool.dtype),
            # Two tiles are in flight at once: were they to share a semaphore, a wait for the
            # older one could be satisfied by blocks of the younger.
            pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(seq_lens, block_tables, q, pool)


def _decode_kernel(
    seq_lens_ref,  # i32[B] in SMEM
    block_table_ref,  # i32[1, M] in SMEM
    q_ref,  # [K, G, W], zero in the value lanes
    pool_ref,  # [P, K, S, W] in HBM
    o_ref,  # [K, G, W], the result in the value lanes
    kv_ref,  # [buffers, K, C, W], scratch: a tile of C tokens each
    arrived_ref,  # semaphores [buffers]
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    static_len: int | None,
):
    """One row: its blocks pass through the ring a tile at a time, under an online softmax."""
    num_buffers, _, C, _ = kv_ref.shape
    (num_semaphores,) = arrived_ref.shape
    K, G, W = q_ref.shape
    S = pool_ref.shape[2]
    end = seq_lens_ref[pl.program_id(0)] if static_len is None else static_len
    start = 0 if window is None else jnp.maximum(end - window, 0)
    first_tile, end_tile = start // C, pl.cdiv(end, C)
    precision = jax.lax.Precision.HIGHEST if kv_ref.dtype == jnp.float32 else None

    def copies(tile, act):
        """Acts on the copy of each of the tile's blocks that hold a visible token."""
        first = tile * (C // S)

        def copy(column, _):
            slots = kv_ref.at[
                tile % num_buffers, :, pl.ds(pl.multiple_of((column - first) * S, S), S), :
            ]
            block = pool_ref.at[block_table_ref[0, column]]
            act(pltpu.make_async_copy(block, slots, arrived_ref.at[tile % num_semaphores]))

        if static_len is not None:
            for i in range(C // S):  # a loop in a loop is not multiplied in an estimate
                copy(first + i, None)
            return
        last = jnp.minimum(first + C // S, pl.cdiv(end, S))
        jax.lax.fori_loop(jnp.maximum(first, start // S), last, copy, None)

    def visible(tile, shape, axis):
        positions = tile * C + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (positions >= start) & (positions < end)

    def absorb(tile, state):
        @pl.when(tile + 1 < end_tile)
        def _fetch_next():
            copies(tile + 1, _start)

        copies(tile, _wait)

        has_edge = (tile * C < start) | ((tile + 1) * C > end)

        @pl.when(has_edge if static_len is None else False)
        def _clear_unseen():  # unused slots may hold NaN, and zero times NaN is NaN
            kv = kv_ref[tile % num_buffers]
            kv_ref[tile % num_buffers] = jnp.where(visible(tile, kv.shape, 1), kv, 0)

        high, total, values = state
        kv = kv_ref[tile % num_buffers]
        # The query is zero in the value lanes, so this is q times k without slicing k out.
        logits = scale * jnp.einsum(
            "KGW,KCW->KGC",
            q_ref[...],
            kv,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(visible(tile, logits.shape, 2), logits, MASKED)
        new_high = jnp.maximum(high, jnp.max(logits, axis=-1, keepdims=True))
        shrink = jnp.exp(high - new_high)
        weights = jnp.exp(logits - new_high)
        weighted = jnp.einsum(
            "KGC,KCW->KGW",
            weights.astype(kv.dtype),
            kv,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_high, total, values * shrink + weighted

    copies(first_tile, _start)
    state = (
        jnp.full((K, G, 1), MASKED, jnp.float32),
        jnp.zeros((K, G, 1), jnp.float32),
        jnp.zeros((K, G, W), jnp.float32),
    )
    _, total, values = jax.lax.fori_loop(first_tile, end_tile, absorb, state)
    o_ref[...] = (values / jnp.where(total > 0, total, 1)).astype(o_ref.dtype)


def _start(copy):
    copy.start()


def _wait(copy):
    copy.wait()
