"""Decode attention on a TPU: one query token a row, blocks fetched through the row's table.

pallas_kernels/README.md draws the algorithm.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.tpu.device import (
    LANES,
    SUBLANES,
    check_pool,
    num_cores,
    simulator,
    streaming_params,
)
from pallas_kernels.tpu.ring import Ring, Walk, clear_unseen
from pallas_kernels.tpu.softmax import Head, Softmax, absorb, compute_dtype, head_lanes
from pallas_kernels.tpu.tiles import KvTile, block_bytes, longest_tile, tuned_tile, usual_ring

MAX_TILE_BYTES = 2 << 20  # a ring of them, queries and results fit the 16 MiB of a v5e program
MAX_LOGITS = 48 << 10  # of the heads that are computed on at once: registers hold 64 K floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTile(KvTile):
    """How the kernel is cut."""


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
    tile: DecodeTile | None = None,
    static_len: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row; a row of length 0 gives zeros.

    The token is the one at position `seq_lens - 1`, and its K and V are in the pool. Slots at and
    behind `seq_lens`, slots that have left the window and blocks that no row names may hold NaN.
    Ids of live blocks must be in the pool and lengths in the tables: the hardware does not look.
    `static_len` is every row's length, for a compiler's estimate. With `interpret` a TPU is
    simulated on whatever device there is, as `InterpretParams` say.
    """
    B, N, H = q.shape
    _, K, _, W = pool.shape
    G = N // K
    check_pool(pool.shape[2], pool.dtype)
    queries = _padded(G)
    # Float32, since Mosaic cannot take half a register of bfloat16 on v5e.
    q_BKQV = q.reshape(B, K, G, H).astype(jnp.float32)
    q_BKQV = jnp.pad(q_BKQV, [(0, 0), (0, 0), (0, queries - G), (0, head_lanes(W) - H)])
    if sinks is not None:
        sinks = jnp.pad(
            sinks.reshape(K, G, 1).astype(jnp.float32), [(0, 0), (0, queries - G), (0, 0)]
        )
    out_BKGV = _decode_call(
        seq_lens,
        block_tables[:, None, :],
        q_BKQV,
        pool,
        sinks,
        kv_scales,
        compute_dtype=compute_dtype(q, pool),
        tile=tile or choose_tile(q, pool, block_tables.shape[1]),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        static_len=static_len,
        interpret=simulator(interpret),
    )
    return out_BKGV[:, :, :G, -H:].reshape(B, N, H).astype(q.dtype)


def choose_tile(
    q: Float[Array, "B N H"], pool: Real[Array, "P K S W"], max_blocks: int
) -> DecodeTile:
    """The table's tile, cut to the block tables, or the default."""
    _, N, H = q.shape
    _, K, S, _ = pool.shape
    fields = tuned_tile("decode", heads=(N, K, H), pool=pool)
    if fields is None:
        return default_tile(pool, max_blocks, N // K)
    tile = DecodeTile(**fields)
    return dataclasses.replace(tile, blocks=min(tile.blocks, longest_tile(S, max_blocks)))


def default_tile(pool: Real[Array, "P K S W"], max_blocks: int, group: int) -> DecodeTile:
    """As many tokens as the ring and the registers hold, a power of two of blocks.

    Hundreds: fewer in flight and the latency of a copy shows, and one head's steps wait for each
    other. No longer than a table.
    """
    _, K, S, _ = pool.shape
    most_logits = MAX_LOGITS // (_padded(group) * S * min(K, 3))
    blocks = min(MAX_TILE_BYTES // block_bytes(pool), most_logits)
    blocks = min(max(1, blocks), longest_tile(S, max_blocks))
    ring = usual_ring(pool, MAX_TILE_BYTES)
    return DecodeTile(blocks=1 << (blocks.bit_length() - 1), ring=ring)


def _padded(group: int) -> int:
    """Queries of a KV head in whole registers."""
    return pl.cdiv(group, SUBLANES) * SUBLANES


def _decode_call(
    seq_lens: Int32[Array, " B"],
    block_tables: Int32[Array, "B 1 M"],
    q: Float[Array, "B K Q V"],
    pool: Real[Array, "P K S W"],
    sinks: Float[Array, "K Q 1"] | None,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    compute_dtype: jnp.dtype,
    tile: DecodeTile,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    static_len: int | None,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "B K Q V"]:
    """The kernel over a grid of rows; the pool stays where it is, two rows' tables are in SMEM.

    Each core has consecutive rows of its own.
    """
    B, K, Q, V = q.shape
    S, W = pool.shape[2:]
    M = block_tables.shape[2]
    cores = num_cores(interpret)
    if B % cores:
        padding = [(0, -B % cores)]
        seq_lens = jnp.pad(seq_lens, padding)
        block_tables = jnp.pad(block_tables, [*padding, (0, 0), (0, 0)])
        q = jnp.pad(q, [*padding, (0, 0), (0, 0), (0, 0)])
    rows = q.shape[0] // cores
    last = q.shape[0] - 1
    whole_smem = pl.BlockSpec(memory_space=pltpu.SMEM)

    # All tables would not fit the 1 MiB of SMEM at 256 rows of 1024 blocks.
    def table(step: int) -> pl.BlockSpec:
        def place(core, row):
            return jnp.minimum(core * rows + row + step, last), 0, 0

        return pl.BlockSpec((None, 1, M), place, memory_space=pltpu.SMEM)

    heads = pl.BlockSpec((None, K, Q, V), lambda core, row: (core * rows + row, 0, 0, 0))
    return pl.pallas_call(
        functools.partial(
            _decode_kernel,
            compute_dtype=compute_dtype,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            static_len=static_len,
        ),
        name="paged_decode",
        grid=(cores, rows),
        in_specs=[
            whole_smem,
            table(0),
            table(1),
            heads,
            pl.BlockSpec(memory_space=pl.ANY),
            None if sinks is None else pl.BlockSpec((K, Q, 1), lambda *_: (0, 0, 0)),
            None if kv_scales is None else whole_smem,
        ],
        out_specs=heads,
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((tile.ring, K, tile.blocks * S, W), pool.dtype),
            pltpu.SemaphoreType.DMA((tile.ring,)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((K, Q, LANES), jnp.float32),
            pltpu.VMEM((K, Q, LANES), jnp.float32),
            pltpu.VMEM((K, Q, V), jnp.float32),
        ],
        compiler_params=streaming_params(tile.ring_bytes(pool), interpret),
        interpret=interpret,
    )(seq_lens, block_tables, block_tables, q, pool, sinks, kv_scales)[:B]


def _decode_kernel(
    seq_lens_ref,  # i32[B] in SMEM
    table_ref,  # i32[1, M] in SMEM
    next_table_ref,  # i32[1, M] in SMEM, of the next row
    q_ref,  # f32[K, Q, V], zero behind the first H lanes
    pool_ref,  # [P, K, S, W] in HBM
    sinks_ref,  # f32[K, Q, 1], or None
    kv_scales_ref,  # f32[2, K] in SMEM, or None
    o_ref,  # f32[K, Q, V], the result in the last H lanes
    kv_ref,  # [ring, K, C, W], scratch: a tile of C tokens each
    arrived_ref,  # DMA semaphores [ring]
    turn_ref,  # i32[1] in SMEM
    high_ref,  # f32[K, Q, LANES]
    total_ref,  # f32[K, Q, LANES]
    values_ref,  # f32[K, Q, V]
    *,
    compute_dtype: jnp.dtype,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    static_len: int | None,
):
    """One row: its blocks pass through the ring a tile at a time, under an online softmax."""
    _, K, C, _ = kv_ref.shape
    Q = q_ref.shape[1]
    place, num_rows = pl.program_id(1), pl.num_programs(1)
    first_row = pl.program_id(0) * num_rows
    ring = Ring(pool_ref, kv_ref, arrived_ref, turn_ref)
    softmax = Softmax(high_ref, total_ref, values_ref)

    def walk(place, table) -> Walk:
        """What a row of this core sees; the one behind the last, nothing."""
        if static_len is not None:
            return Walk(table, 0 if window is None else max(static_len - window, 0), static_len)
        row = first_row + jnp.minimum(place, num_rows - 1)
        end = jnp.where(place < num_rows, seq_lens_ref[row], 0)
        return Walk(table, 0 if window is None else jnp.maximum(end - window, 0), end)

    this, following = walk(place, table_ref), walk(place + 1, next_table_ref)

    def absorb_slots(slots_ref, seen_QC, meanwhile) -> None:
        for group in _groups(K, Q * slots_ref.shape[1]):
            heads = [
                Head(
                    head,
                    q_ref[head].astype(compute_dtype),
                    slots_ref.at[head],
                    scale if kv_scales_ref is None else scale * kv_scales_ref[0, head],
                )
                for head in group
            ]
            absorb(softmax, heads, seen_QC, soft_cap=soft_cap, meanwhile=meanwhile)
            meanwhile = None

    def absorb_edge(tile, slots_ref) -> None:
        clear_unseen(slots_ref, tile * C, this)
        positions_QC = tile * C + jax.lax.broadcasted_iota(jnp.int32, (Q, slots_ref.shape[1]), 1)
        seen_QC = (positions_QC >= this.start) & (positions_QC < this.end)
        absorb_slots(slots_ref, seen_QC, None)

    def absorb_tile(tile, tile_ref, meanwhile) -> None:
        if meanwhile is not None:
            absorb_slots(tile_ref, None, meanwhile)
            return
        few = C // 4  # a short context need not pay for a whole tile
        if few % LANES:
            absorb_edge(tile, tile_ref)
            return
        is_short = this.end - tile * C <= few
        pl.when(is_short)(lambda: absorb_edge(tile, tile_ref.at[:, pl.ds(0, few), :]))
        pl.when(jnp.logical_not(is_short))(lambda: absorb_edge(tile, tile_ref))

    softmax.reset(sinks_ref)
    ring.stream(
        this,
        following,
        absorb_tile,
        plain_end=this.end if window is None else None,
        is_first=place == 0,
    )
    for head in range(K):
        values = softmax.result(head)
        o_ref[head] = values if kv_scales_ref is None else values * kv_scales_ref[1, head]


def _groups(num_heads: int, logits: int) -> list[range]:
    """Heads of so many logits, cut into few groups of like size that the registers hold."""
    count = pl.cdiv(num_heads, max(1, MAX_LOGITS // logits))
    cuts = [num_heads * i // count for i in range(count + 1)]
    return [range(*cut) for cut in itertools.pairwise(cuts)]
