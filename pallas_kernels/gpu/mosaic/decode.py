"""Decode attention on a Hopper GPU: a fixed grid of programs shares out the splits of all contexts.

README.md beside this file says why it is cut as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.common import LOG2_E
from pallas_kernels.gpu.device import target_processors
from pallas_kernels.gpu.mosaic.common import (
    COMPILER_PARAMS,
    SWIZZLED,
    WARPGROUP_ROWS,
    accumulate,
    accumulate_interpreted,
    by_rows,
    check_tile,
    clear_unseen,
    column_iota,
    full_rows,
    load_tile,
    named,
    own_array,
    pieces_of,
    plgpu,
    product,
    simulator,
    soft_capped,
    zero_matrix,
)
from pallas_kernels.gpu.mosaic.limits import SWIZZLE_ROWS
from pallas_kernels.gpu.mosaic.merge import merge
from pallas_kernels.gpu.mosaic.work import END, PLACE, ROW, START, list_splits
from pallas_kernels.gpu.splits import ceil_div, max_splits
from pallas_kernels.layout import MASKED

TILE_BYTES = 32 << 10  # of keys and values
SIDES = 2  # the queries of a split, and of the next one
PROCESSORS = 132  # of an H100 or H200 in the SXM form
SIMULATED_PROGRAMS = 3
COMPUTE, LOAD = range(2)  # the warpgroups
IDS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicDecodeConfig:
    """How the decode kernel is cut. A row's bits follow `tile_tokens` and `split_tokens` alone.

    Each of `num_programs` programs, by default one a processor, takes every so-manieth split of
    `split_tokens`, and computes on `tile_tokens` at a time while `num_stages - 1` other tiles are
    under way.
    """

    tile_tokens: int
    split_tokens: int = 512
    num_stages: int = 4
    num_programs: int | None = None

    def __post_init__(self) -> None:
        tile = self.tile_tokens
        if tile < WARPGROUP_ROWS or tile % WARPGROUP_ROWS:
            raise ValueError(f"tile_tokens must be a multiple of {WARPGROUP_ROWS}, got {tile}")
        if self.split_tokens < tile or self.split_tokens % tile:
            raise ValueError(
                f"split_tokens must be a multiple of tile_tokens={tile}, got {self.split_tokens}"
            )
        if self.num_stages < 1 or (self.num_programs is not None and self.num_programs < 1):
            raise ValueError(
                "num_stages and num_programs must be at least 1, "
                f"got {self.num_stages} and {self.num_programs}"
            )


def decode_config(head_size: int) -> MosaicDecodeConfig:
    """A sound cut for a head size, of 16 bits: tiles of 32 KiB, as many as shared memory takes."""
    tile = max(WARPGROUP_ROWS, TILE_BYTES // (4 * head_size))
    return MosaicDecodeConfig(tile_tokens=tile, split_tokens=512 if head_size > 64 else 256)


def paged_decode(
    q: Float[Array, "B N H"],
    pool: Float[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    config: MosaicDecodeConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row; a row of length 0 gives zeros.

    The token is the one at position `seq_lens - 1`, and its K and V are in the pool. Slots at and
    behind `seq_lens`, slots that have left the window and blocks that no row names may hold NaN.
    `interpret` simulates the kernel and looks for races. The arrays have passed
    `limits.check_arrays`; raises ValueError for a `config` whose tiles do not fit the blocks.
    """
    B, N, H = q.shape
    P, K, S, W = pool.shape
    G = N // K
    config = config or decode_config(H)
    check_tile(config.tile_tokens, S)
    block_tables, seq_lens = own_array(block_tables), own_array(seq_lens)
    num_splits = max_splits(block_tables.shape[1] * S, config.split_tokens, window)
    items, count = list_splits(
        seq_lens, split_tokens=config.split_tokens, max_splits=num_splits, window=window
    )
    rows = pl.cdiv(G, SWIZZLE_ROWS) * SWIZZLE_ROWS
    queries = jnp.pad(q.reshape(B, K, G, H), ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    stages = config.num_stages
    values, stats = plgpu.kernel(
        named(
            _paged_decode_kernel,
            tile_tokens=config.tile_tokens,
            num_kv_heads=K,
            block_size=S,
            scale=scale,
            soft_cap=soft_cap,
            accumulate=accumulate_interpreted if interpret else accumulate,
        ),
        out_type=(
            jax.ShapeDtypeStruct((B, K, num_splits, G, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, num_splits, 2, WARPGROUP_ROWS), jnp.float32),
        ),
        grid=(config.num_programs or _num_programs(interpret),),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": plgpu.SMEM((SIDES, WARPGROUP_ROWS, H), q.dtype, transforms=SWIZZLED),
            "kv_smem": plgpu.SMEM((stages, config.tile_tokens, W), pool.dtype, transforms=SWIZZLED),
            "values_smem": plgpu.SMEM((WARPGROUP_ROWS, H), jnp.float32),
            "stats_smem": plgpu.SMEM((2, WARPGROUP_ROWS), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=SIDES),
            "q_empty": plgpu.Barrier(num_barriers=SIDES),
            "full": plgpu.Barrier(
                num_arrivals=pieces_of(config.tile_tokens, S), num_barriers=stages
            ),
            "empty": plgpu.Barrier(num_barriers=stages),
        },
        compiler_params=COMPILER_PARAMS,
        interpret=simulator(interpret),
    )(items, count, block_tables, queries, pool.reshape(P * K * S, W))
    return merge(
        values,
        stats,
        seq_lens,
        sinks=sinks,
        split_tokens=config.split_tokens,
        window=window,
        dtype=q.dtype,
        interpret=interpret,
    )


def _num_programs(interpret: bool) -> int:
    return SIMULATED_PROGRAMS if interpret else target_processors() or PROCESSORS


def _paged_decode_kernel(
    items_ref,  # i32[I, 4]
    count_ref,  # i32[1]
    tables_ref,  # i32[B, M]
    q_ref,  # [B, K, rows, H], the G queries of a KV head and padding
    pool_ref,  # [P * K * S, W]
    values_ref,  # f32[B, K, X, G, H], each split's weighted sum of values
    stats_ref,  # f32[B, K, X, 2, 64], its highest logit in base 2 and its sum of weights
    *,
    q_smem,
    kv_smem,
    values_smem,
    stats_smem,
    q_full,
    q_empty,
    full,
    empty,
    tile_tokens: int,
    num_kv_heads: int,
    block_size: int,
    scale: float,
    soft_cap: float | None,
    accumulate: Callable[..., Any],
):
    """One warpgroup loads, the other computes; both walk the same splits, tile by tile."""
    C, H, stages = tile_tokens, q_smem.shape[2], kv_smem.shape[0]
    program, num_programs = jax.lax.axis_index("program"), jax.lax.axis_size("program")
    num_items = count_ref[0] * num_kv_heads
    num_mine = ceil_div(jnp.maximum(num_items - program, 0), num_programs)

    def read_item(turn):
        """A split of a KV head: its row, place, start and end, and the head."""
        item = program + jnp.minimum(turn, num_mine - 1) * num_programs
        split = jax.lax.div(item, jnp.int32(num_kv_heads))
        fields = [items_ref[split, column] for column in (ROW, PLACE, START, END)]
        return *fields, jax.lax.rem(item, jnp.int32(num_kv_heads))

    def walk(do_item):
        """Calls `do_item(turn, item, step)`; steps count the tiles of all items."""

        def one(turn, state):
            item, step = state
            return read_item(turn + 1), do_item(turn, item, step)  # the next is read meanwhile

        @pl.when(num_mine > 0)
        def start():
            jax.lax.fori_loop(0, num_mine, one, (read_item(0), jnp.int32(0)))

    def walk_tiles(start, end, do_tile, state):
        first = jax.lax.div(start, jnp.int32(C))
        return jax.lax.fori_loop(first, ceil_div(end, C), do_tile, state)

    @pl.when(jax.lax.axis_index("warpgroup") == LOAD)
    def load():
        def load_item(turn, item, step):
            row, _, start, end, head = item
            side = jax.lax.rem(turn, jnp.int32(SIDES))
            last_block = jax.lax.div(end - 1, jnp.int32(block_size))

            @pl.when(turn >= SIDES)
            def wait_for_room():
                plgpu.barrier_wait(q_empty.at[side])

            q_rows = q_smem.at[side, pl.ds(0, q_ref.shape[2])]  # the others' results are not used
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_rows, q_full.at[side])

            def load_one(tile, step):
                slot = jax.lax.rem(step, jnp.int32(stages))

                def wait_for_room():
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))

                load_tile(
                    pool_ref,
                    tables_ref,
                    kv_smem.at[slot],
                    row=row,
                    head=head,
                    tile=tile,
                    last_block=last_block,
                    block_size=block_size,
                    num_kv_heads=num_kv_heads,
                    ids_at_once=IDS_AT_ONCE,
                    wait_for_room=wait_for_room,
                    full=full.at[slot],
                )
                return step + 1

            return walk_tiles(start, end, load_one, step)

        walk(load_item)

    @pl.when(jax.lax.axis_index("warpgroup") == COMPUTE)
    def compute():
        def attend(turn, item, step):
            row, place, start, end, head = item
            side = jax.lax.rem(turn, jnp.int32(SIDES))
            plgpu.barrier_wait(q_full.at[side])

            def absorb(tile, state):
                step, high_X, total_X, values_XH = state
                slot, first = jax.lax.rem(step, jnp.int32(stages)), tile * C
                plgpu.barrier_wait(full.at[slot])
                tile_ref = kv_smem.at[slot]
                keys_ref, values_ref = tile_ref.at[:, pl.ds(0, H)], tile_ref.at[:, pl.ds(H, H)]

                is_edge = (first < start) | (first + C > end)

                @pl.when(is_edge)
                def clear():
                    clear_unseen(values_ref, start - first, end - first)

                def hide(logits_XC):
                    positions_XC = column_iota(logits_XC.shape) + first
                    seen_XC = (positions_XC >= start) & (positions_XC < end)
                    return jnp.where(seen_XC, logits_XC, MASKED)

                logits_XC = product(q_smem.at[side], keys_ref)
                if soft_cap is None:
                    logits_XC *= scale * LOG2_E
                else:
                    logits_XC = soft_capped(logits_XC, scale, soft_cap)
                logits_XC = jax.lax.cond(is_edge, hide, lambda x: x, logits_XC)
                new_high_X = jnp.maximum(high_X, jnp.max(logits_XC, axis=1))
                shrink_X = jnp.exp2(high_X - new_high_X)
                weights_XC = jnp.exp2(logits_XC - by_rows(new_high_X, C))
                total_X = total_X * shrink_X + jnp.sum(weights_XC, axis=1)
                values_XH = values_XH * by_rows(shrink_X, H)
                values_XH = accumulate(values_XH, weights_XC.astype(q_smem.dtype), values_ref)
                plgpu.barrier_arrive(empty.at[slot])
                return step + 1, new_high_X, total_X, values_XH

            X = WARPGROUP_ROWS
            state = step, full_rows(X, MASKED), full_rows(X, 0.0), zero_matrix((X, H))
            step, high_X, total_X, values_XH = walk_tiles(start, end, absorb, state)
            plgpu.barrier_arrive(q_empty.at[side])
            plgpu.wait_smem_to_gmem(0)  # of the split before
            values_smem[...], stats_smem[0], stats_smem[1] = values_XH, high_X, total_X
            plgpu.commit_smem()
            real = values_smem.at[pl.ds(0, values_ref.shape[3])]
            plgpu.copy_smem_to_gmem(real, values_ref.at[row, head, place])
            plgpu.copy_smem_to_gmem(stats_smem, stats_ref.at[row, head, place])
            return step

        walk(attend)
        plgpu.wait_smem_to_gmem(0)
