"""Prefill attention on a Hopper GPU: many query tokens of a row at once, against the row's blocks.

A program has a tile of consecutive tokens of one row with all query heads of one KV head. Two
warpgroups compute, each on 64 rows of queries, and take turns: while one multiplies matrices, the
other takes exponentials (FlashAttention-3, arXiv 2407.08608). A third loads keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gpu.batch import list_tiles, with_decoded
from pallas_kernels.gpu.common import LOG2_E, absorb_sinks
from pallas_kernels.gpu.mosaic.common import (
    COMPILER_PARAMS,
    ROWS,
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
    row_iota,
    simulator,
    soft_capped,
    zero_matrix,
)
from pallas_kernels.layout import MASKED, PagedBatch

STAGE_BYTES = 128 << 10  # of all tiles of keys and values
COMPUTE_WARPGROUPS = 2
LOAD = COMPUTE_WARPGROUPS  # the last warpgroup
# Of a thread of a warpgroup that computes, twice, and of the one that loads: at most 504 in all, as
# 3 warpgroups start with 168 each. A warpgroup that asks for more waits for ever.
REGISTERS, MORE_REGISTERS = (232, 40), (240, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicPrefillConfig:
    """How the prefill kernel is cut: tokens of keys and values in a tile, and tiles in memory.

    A token's bits follow `context_tokens`.
    """

    context_tokens: int
    num_stages: int

    def __post_init__(self) -> None:
        tokens = self.context_tokens
        if tokens < WARPGROUP_ROWS or tokens % WARPGROUP_ROWS:
            raise ValueError(f"context_tokens must be a multiple of {WARPGROUP_ROWS}, got {tokens}")
        if self.num_stages < 2:  # the next tile is waited for before this one's place is free
            raise ValueError(f"num_stages must be at least 2, got {self.num_stages}")


def prefill_config(head_size: int, *, has_options: bool = False) -> MosaicPrefillConfig:
    """A sound cut for a head size, of 16 bits; a window, a cap and sinks take registers."""
    context = 64 if head_size > 64 and has_options else 128
    return MosaicPrefillConfig(
        context_tokens=context, num_stages=STAGE_BYTES // (context * 4 * head_size)
    )


def paged_prefill(
    q: Float[Array, "T N H"],
    pool: Float[Array, "P K S W"],
    batch: PagedBatch,
    decoded: Float[Array, "B N H"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    config: MosaicPrefillConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch whose decode rows are `decoded` already.

    Slots behind a row's length or before all its windows and blocks that no row names may hold
    NaN. Padding tokens give their own query back: where the caller has no more use for `q`, the
    answer takes its place. The arrays have passed `limits.check_arrays`; raises ValueError for a
    `config` whose tiles do not fit the blocks.
    """
    T, N, H = q.shape
    P, K, S, W = pool.shape
    G = N // K
    has_options = any(option is not None for option in (window, soft_cap, sinks))
    config = config or prefill_config(H, has_options=has_options)
    check_tile(config.context_tokens, S)
    tokens = WARPGROUP_ROWS // G  # of a warpgroup
    tiles = list_tiles(batch, num_tokens=T, query_tokens=COMPUTE_WARPGROUPS * tokens)
    more = []
    if sinks is not None:
        heads_X = np.arange(WARPGROUP_ROWS) % G
        more = [sinks.astype(jnp.float32).reshape(K, G)[:, heads_X]]
    # Changed in place: a program reads the very queries that it answers, and nobody else does.
    answers = jax.new_ref(with_decoded(q, batch, decoded).reshape(T, K, G, H))
    stages = config.num_stages
    plgpu.kernel(
        named(
            _paged_prefill_kernel,
            num_tokens=tokens,
            context_tokens=config.context_tokens,
            block_size=S,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            accumulate=accumulate_interpreted if interpret else accumulate,
        ),
        out_type=(),
        grid=(tiles.shape[0], K),
        grid_names=("tile", "head"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={
            "plain_smem": plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, H), q.dtype),
            "q_smem": plgpu.SMEM(
                (COMPUTE_WARPGROUPS, WARPGROUP_ROWS, H), q.dtype, transforms=SWIZZLED
            ),
            "kv_smem": plgpu.SMEM(
                (stages, config.context_tokens, W), pool.dtype, transforms=SWIZZLED
            ),
            "sinks_smem": plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=tokens, num_barriers=COMPUTE_WARPGROUPS),
            "sinks_full": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            "full": plgpu.Barrier(
                num_arrivals=pieces_of(config.context_tokens, S), num_barriers=stages
            ),
            "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        },
        compiler_params=COMPILER_PARAMS,
        interpret=simulator(interpret),
    )(tiles, own_array(batch.block_tables), pool.reshape(P * K * S, W), answers, *more)
    return jax.freeze(answers).reshape(T, N, H)


def _paged_prefill_kernel(
    tiles_ref,  # i32[tiles, 4]: row, first token, number of tokens, first position
    tables_ref,  # i32[B, M]
    pool_ref,  # [P * K * S, W]
    answers_ref,  # [T, K, G, H], the queries, changed in place
    *sinks_refs,  # f32[K, 64], of each row of queries, where there are any
    plain_smem,
    q_smem,
    kv_smem,
    sinks_smem,
    q_full,
    sinks_full,
    full,
    empty,
    turn,
    num_tokens: int,
    context_tokens: int,
    block_size: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    accumulate: Callable[..., Any],
):
    """A tile of queries against its row's context: two warpgroups compute, a third loads."""
    C, X, (_, K, G, H), stages = context_tokens, WARPGROUP_ROWS, answers_ref.shape, kv_smem.shape[0]
    head, warpgroup = jax.lax.axis_index("head"), jax.lax.axis_index("warpgroup")
    row, first_token, count, first = (tiles_ref[jax.lax.axis_index("tile"), i] for i in range(4))
    last = first + count - 1  # position, of the tile's last token
    # KV tiles from `start` to `end`; every query sees whole those from `inner` to `outer`.
    start, outer, end = 0, (first + 1) // C, last // C + 1
    if window is not None:
        start = jnp.maximum(first - window + 1, 0) // C
    inner = start if window is None else jnp.maximum(last - window + C, 0) // C
    inner = jnp.minimum(inner, end)
    outer = jnp.maximum(outer, inner)
    factor = scale * LOG2_E if soft_cap is None else 1.0  # of logits, to base 2
    compute_registers, load_registers = REGISTERS if C * H <= 64 * 128 else MORE_REGISTERS
    ids_at_once = 4 if pieces_of(C, block_size) <= 8 else 2

    @pl.when((count > 0) & (warpgroup == LOAD))
    def load():
        plgpu.set_max_registers(load_registers, action="decrease")

        @pl.loop(start, end)
        def load_one(tile):
            step = tile - start
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
                last_block=last // block_size,
                block_size=block_size,
                num_kv_heads=K,
                ids_at_once=ids_at_once,
                wait_for_room=wait_for_room,
                full=full.at[slot],
            )

    @pl.when((count > 0) & (warpgroup != LOAD))
    def compute():
        plgpu.set_max_registers(compute_registers, action="increase")
        my_first = warpgroup * num_tokens  # token of the tile

        def my_copies(do_copy):
            for place in range(num_tokens):
                do_copy(my_first + place, plain_smem.at[warpgroup, pl.ds(place * G, G)])

        def load_queries(token, rows_ref):
            token = first_token + jnp.minimum(token, count - 1)  # where there is none, any
            plgpu.copy_gmem_to_smem(answers_ref.at[token, head], rows_ref, q_full.at[warpgroup])

        my_copies(load_queries)
        plgpu.barrier_wait(q_full.at[warpgroup])
        queries_XH = plgpu.load(plain_smem.at[warpgroup], layout=plgpu.Layout.WGMMA)
        q_smem[warpgroup] = queries_XH
        plgpu.commit_smem()

        def pass_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        limits_X = row_iota(X) // G + (first + my_first)  # positions
        seen_from = jnp.int32(0) if window is None else first - window + 1

        def clear(tile, values_ref):
            """Zeroes values that no query of the tile sees, which may be NaN."""
            begin = tile * C

            # The first warpgroup's turn comes between this and what the other makes of the tile.
            @pl.when((warpgroup == 0) & ((begin < seen_from) | (begin + C > last + 1)))
            def clear_alone():
                clear_unseen(values_ref, seen_from - begin, last + 1 - begin)

        def hide(tile, logits_XC):
            positions_XC = column_iota((X, C)) + tile * C
            visible_XC = positions_XC <= by_rows(limits_X, C)
            if window is not None:
                visible_XC &= positions_XC > by_rows(limits_X - window, C)
            return jnp.where(visible_XC, logits_XC, MASKED)

        def absorb(tile, state, *, is_edge):
            high_X, total_X, values_XH = state
            slot = jax.lax.rem(tile - start, jnp.int32(stages))
            tile_ref = kv_smem.at[slot]
            keys_ref, values_ref = tile_ref.at[:, pl.ds(0, H)], tile_ref.at[:, pl.ds(H, H)]
            if is_edge:
                clear(tile, values_ref)
            logits_XC = product(q_smem.at[warpgroup], keys_ref, meanwhile=pass_turn)
            if soft_cap is not None:
                logits_XC = soft_capped(logits_XC, scale, soft_cap)
            if is_edge:
                logits_XC = hide(tile, logits_XC)
            new_high_X = jnp.maximum(high_X, jnp.max(logits_XC, axis=1) * factor)
            shrink_X = jnp.exp2(high_X - new_high_X)
            weights_XC = jnp.exp2(logits_XC * factor - by_rows(new_high_X, C))
            values_XH *= by_rows(shrink_X, H)
            total_X = total_X * shrink_X + jnp.sum(weights_XC, axis=1)
            state = new_high_X, total_X, values_XH, weights_XC.astype(q_smem.dtype)
            # All of it before the other warpgroup's turn, which so multiplies meanwhile.
            new_high_X, total_X, values_XH, weights_XC = jax.lax.optimization_barrier(state)
            pass_turn()

            def wait_for_next():
                @pl.when(tile + 1 < end)
                def wait():
                    following = jax.lax.rem(tile + 1 - start, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[following])

            values_XH = accumulate(values_XH, weights_XC, values_ref, meanwhile=wait_for_next)
            plgpu.barrier_arrive(empty.at[slot])
            return new_high_X, total_X, values_XH

        def walk(begin, stop, state, *, is_edge):
            return jax.lax.fori_loop(
                begin, stop, lambda tile, state: absorb(tile, state, is_edge=is_edge), state
            )

        # Above what is masked, which so has no weight in a query that has seen nothing yet.
        state = full_rows(X, MASKED * factor / 2), full_rows(X, 0.0), zero_matrix((X, H))
        plgpu.barrier_wait(full.at[0])
        pl.when(warpgroup == 1)(pass_turn)
        if window is not None:
            state = walk(start, inner, state, is_edge=True)
        state = walk(inner, outer, state, is_edge=False)
        high_X, total_X, values_XH = walk(outer, end, state, is_edge=True)
        pl.when(warpgroup == 0)(pass_turn)
        if sinks_refs:  # not earlier: every register is taken
            my_sinks = sinks_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(sinks_refs[0].at[head], my_sinks, sinks_full.at[warpgroup])
            plgpu.barrier_wait(sinks_full.at[warpgroup])
            sinks_X = plgpu.load(my_sinks, layout=ROWS)
            total_X, shrink_X = absorb_sinks(sinks_X, high_X, total_X)
            values_XH *= by_rows(shrink_X, H)
        plain_smem[warpgroup] = (values_XH / by_rows(total_X, H)).astype(q_smem.dtype)
        plgpu.commit_smem()

        def store_answers(token, rows_ref):
            @pl.when(token < count)
            def store():
                plgpu.copy_smem_to_gmem(rows_ref, answers_ref.at[first_token + token, head])

        my_copies(store_answers)
        plgpu.wait_smem_to_gmem(0)
