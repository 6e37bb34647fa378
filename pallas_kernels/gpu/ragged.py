"""Prefill attention on a GPU: many query tokens of a row at once, against the row's blocks.

The batch becomes a flat list of tiles. A tile is some consecutive tokens of one row with all the
query heads of one KV head, token by token, so that they share what is loaded. It walks the row's
context under an online softmax, and masks where not every query sees everything: at the diagonal
and where a window ends. The sizes of both are fixed and the context is cut at multiples of its own,
so a token's bits depend on the tile it is in, hence on where its row's chunk starts, and on nothing
else in the batch.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Real

from pallas_kernels.gpu.batch import list_tiles, with_decoded
from pallas_kernels.gpu.common import (
    LOG2_E,
    MAX_ELEMENTS,
    absorb_sinks,
    check_arrays,
    head_scales,
    indices,
    nothing,
)
from pallas_kernels.gpu.device import target_capability
from pallas_kernels.gpu.tiles import MIN_TILE_TOKENS, padded_size, tuned_fields
from pallas_kernels.layout import MASKED, PagedBatch
from pallas_kernels.quantize import product_dtype

NARROW_CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "12.0", "12.1")  # in matrix instructions
SMALL_CAPABILITIES = ("8.6", "8.9", "12.0", "12.1")  # 99 KiB of shared memory, others 163 or more


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedConfig:
    """The sizes of a tile, and how the compiler is to build the kernel; they change the bits.

    `query_rows` is how many rows of queries (tokens times the query heads of a KV head) a tile
    has room for, `context_tokens` how many keys and values are loaded at a time: powers of two.
    """

    query_rows: int = 128
    context_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (
            ("query_rows", MIN_TILE_TOKENS),
            ("context_tokens", MIN_TILE_TOKENS),
            ("num_warps", 1),
        ):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")


def paged_prefill(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    batch: PagedBatch,
    decoded: Float[Array, "B N H"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    config: RaggedConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch whose decode rows are `decoded` already.

    Slots behind a row's length or before all its windows and blocks that no row names may hold
    NaN. Padding tokens give their own query back: where the caller has no more use for `q`, the
    answer takes its place. Raises ValueError for a dtype or a size that the kernel does not take.
    """
    T, N, H = q.shape
    P, K, S, W = pool.shape
    G, M = N // K, batch.block_tables.shape[1]
    _check(q, pool)
    config = config or choose_config(q, pool)
    query_tokens = config.query_rows // G
    if query_tokens == 0:
        raise ValueError(f"query_rows={config.query_rows} has no room for {G} queries a KV head")
    q = with_decoded(q, batch, decoded)
    tiles = list_tiles(batch, num_tokens=T, query_tokens=query_tokens)
    kernel = functools.partial(
        _prefill_kernel,
        heads=(N, K, H),
        block_size=S,
        max_blocks=M,
        query_rows=config.query_rows,
        context_tokens=config.context_tokens,
        dtype=product_dtype(q, pool),
        has_scales=kv_scales is not None,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        exp2=_exp2_by_jnp if interpret else _exp2_by_gpu,
    )
    more = [] if kv_scales is None else [kv_scales.astype(jnp.float32)]
    more += [] if sinks is None else [sinks]
    out = pl.pallas_call(
        kernel,
        name="paged_prefill",
        grid=(tiles.shape[0] * K,),
        out_shape=jax.ShapeDtypeStruct((T * N * H,), q.dtype),
        # A program reads the very queries that it answers, and nobody else does.
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(tiles, batch.block_tables.ravel(), pool.reshape(P * K * S, W), q.ravel(), *more)
    return out.reshape(T, N, H)


def choose_config(q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]) -> RaggedConfig:
    """The table's sizes, or the formula's."""
    fields = tuned_fields("prefill", q, pool)
    return default_config(q, pool) if fields is None else RaggedConfig(**fields)


def default_config(q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]) -> RaggedConfig:
    """Sizes that compile without a spilled register for compute capability 8.0, 8.9 and 9.0.

    Of those that do, the fastest of a few on an H100 (benchmarks/results).
    """
    _, N, H = q.shape
    lanes, rows = padded_size(H), pl.next_power_of_2(N // pool.shape[1])
    # Without matrix instructions operands fill the registers.
    if product_dtype(q, pool) == jnp.float32:
        size = 32 if lanes <= 64 else 16
        return RaggedConfig(
            query_rows=max(rows, size),
            context_tokens=size,
            num_warps=8,
            num_stages=2 if lanes <= 128 else 1,
        )
    if lanes > 128:
        return RaggedConfig(query_rows=max(rows, 64), context_tokens=32, num_stages=2)
    capability = target_capability()
    if lanes <= 64:
        # There twice as many tokens spill a few bytes, with some options or eight bits.
        context = 32 if capability in NARROW_CAPABILITIES else 64
        return RaggedConfig(query_rows=max(rows, 64), context_tokens=context, num_warps=4)
    if H < 128:
        return RaggedConfig(query_rows=max(rows, 128), context_tokens=32)
    is_small = capability in SMALL_CAPABILITIES
    return RaggedConfig(query_rows=max(rows, 128), num_stages=2 if is_small else 3)


def _check(q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]) -> None:
    check_arrays(q, pool)
    if q.size > MAX_ELEMENTS:
        raise ValueError(
            f"q must have at most {MAX_ELEMENTS} elements, got {q.size}: offsets are int32; "
            "use fewer tokens, or `xla`"
        )


def _prefill_kernel(
    tiles_ref,  # i32[tiles, 4]: row, first token, number of tokens, first position
    tables_ref,  # i32[B * M]
    pool_ref,  # [P * K * S, W]
    q_ref,  # [T * N * H]
    *refs,  # f32[2, K], the scales of a pool of eight bits; [N], the sinks, where there are any;
    # then o_ref, [T * N * H], the memory of q_ref
    heads: tuple[int, int, int],
    block_size: int,
    max_blocks: int,
    query_rows: int,
    context_tokens: int,
    dtype: jnp.dtype,
    has_scales: bool,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    exp2: Callable[[Array, float, Array], Array],
):
    """One tile of queries of one KV head: Q rows of queries against C tokens at a time."""
    scale_refs, (*sinks_refs, o_ref) = refs[:has_scales], refs[has_scales:]
    N, K, H = heads
    S, G, C = block_size, N // K, context_tokens
    program = pl.program_id(0)
    head, tile = program % K, program // K
    num_tokens = tiles_ref[tile, 2]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    key_scale, value_scale = head_scales(scale, scale_refs, head)
    # What is masked has to stay the lowest: a silent head's scale would leave nothing of it.
    factor = scale * LOG2_E if soft_cap is None and not has_scales else LOG2_E

    @pl.when(num_tokens > 0)
    def _attend():
        row, first_token, first = tiles_ref[tile, 0], tiles_ref[tile, 1], tiles_ref[tile, 3]
        last = first + num_tokens - 1
        rows_Q = jnp.arange(query_rows, dtype=jnp.int32)
        tokens_Q = rows_Q // G
        lanes_H = jnp.arange(padded_size(H), dtype=jnp.int32)
        q_offsets_Q = (first_token + tokens_Q) * N + head * G + rows_Q % G
        q_offsets_QH = q_offsets_Q[:, None] * H + lanes_H[None, :]
        # Where G is no power of two, the tile's last rows are the first of the next one.
        mine_Q = (tokens_Q < num_tokens) & (rows_Q < query_rows // G * G)
        mine_QH = mine_Q[:, None] & (lanes_H < H)[None, :]
        q_QH = plt.load(q_ref.at[q_offsets_QH], mask=mine_QH, other=0).astype(dtype)

        def load_ids(turn):
            """The block of each of a turn's tokens; the null block behind the row's last one."""
            columns_C = jax.lax.div(turn * C + jnp.arange(C, dtype=jnp.int32), S)
            at_C = tables_ref.at[row * max_blocks + columns_C]
            return plt.load(at_C, mask=columns_C <= last // S, other=0)

        def load_kv(ids_C, positions_C, seen_C, first_lane):
            slots_C = (ids_C * K + head) * S + jax.lax.rem(positions_C, S)
            at_CH = pool_ref.at[indices(slots_C[:, None], (first_lane + lanes_H)[None, :])]
            masks = [] if lanes_H.size == H else [(lanes_H < H)[None, :]]
            if seen_C is not None:
                masks.append(seen_C[:, None])
            if not masks:
                return plt.load(at_CH).astype(dtype)
            mask = functools.reduce(jnp.logical_and, masks)
            other = nothing(pool_ref.dtype)
            return plt.load(at_CH, mask=mask, other=other).astype(dtype)

        # Turns from `start` to `end`; every query sees whole those from `inner` to `outer`.
        start, outer, end = jnp.int32(0), (first + 1) // C, last // C + 1
        if window is not None:
            start = jnp.maximum(first - window + 1, 0) // C
        inner = start
        if window is not None:
            inner = jnp.maximum(last - window + C, 0) // C

        def absorb(turn, state):
            """Takes in a turn's tokens, masked at the context's two edges alone."""
            ids_C, high_Q, total_Q, values_QH = state
            # Carried, not loaded where it is used: else its load takes the pipeline's stages.
            next_ids_C = load_ids(turn + 1)
            positions_C = turn * C + jnp.arange(C, dtype=jnp.int32)
            limits_Q = first + tokens_Q
            seen_C = positions_C <= last  # unused slots may hold NaN
            if window is not None:
                seen_C &= positions_C > first - window

            def hide(logits_QC):
                visible_QC = positions_C[None, :] <= limits_Q[:, None]
                if window is not None:
                    visible_QC &= positions_C[None, :] > (limits_Q - window)[:, None]
                return jnp.where(visible_QC, logits_QC, MASKED)

            keys_CH = load_kv(ids_C, positions_C, None, 0)
            logits_QC = _dot(q_QH, keys_CH.T, precision)
            if soft_cap is not None:
                logits_QC = soft_cap * jnp.tanh(logits_QC * (key_scale / soft_cap))
            elif has_scales:
                logits_QC *= key_scale
            # A branch, not a loop of its own for each part: that would start the loads anew.
            is_edge = (turn < inner) | (turn >= outer)
            logits_QC = jax.lax.cond(is_edge, hide, lambda x: x, logits_QC)
            new_high_Q = jnp.maximum(high_Q, jnp.max(logits_QC, axis=1) * factor)
            shrink_Q = exp2(high_Q, 1.0, new_high_Q)
            weights_QC = exp2(logits_QC, factor, new_high_Q[:, None])
            total_Q = total_Q * shrink_Q + jnp.sum(weights_QC, axis=1)
            values_CH = load_kv(ids_C, positions_C, seen_C, H)
            weighted_QH = _dot(weights_QC.astype(values_CH.dtype), values_CH, precision)
            values_QH = values_QH * shrink_Q[:, None] + weighted_QH
            return next_ids_C, new_high_Q, total_Q, values_QH

        state = (
            load_ids(start),
            # Above what is masked, which so has no weight in a query that has seen nothing yet.
            jnp.full((query_rows,), MASKED * factor / 2, jnp.float32),
            jnp.zeros((query_rows,), jnp.float32),
            jnp.zeros(q_QH.shape, jnp.float32),
        )
        _, high_Q, total_Q, values_QH = jax.lax.fori_loop(start, end, absorb, state)
        if sinks_refs:
            sinks_Q = plt.load(sinks_refs[0].at[head * G + rows_Q % G])
            total_Q, shrink_Q = absorb_sinks(sinks_Q, high_Q, total_Q)
            values_QH *= shrink_Q[:, None]
        out_QH = values_QH * value_scale / total_Q[:, None]
        plt.store(o_ref.at[q_offsets_QH], out_QH.astype(o_ref.dtype), mask=mine_QH)


def _dot(
    a: Float[Array, "X Y"], b: Float[Array, "Y Z"], precision: jax.lax.Precision | None
) -> Float[Array, "X Z"]:
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _exp2_by_jnp(x: Array, factor: float, high: Array) -> Array:
    return jnp.exp2(x * factor - high)


def _exp2_by_gpu(x: Array, factor: float, high: Array) -> Array:
    """2 ** (x * factor - high) in two instructions; `jnp.exp2` alone takes four, for denormals."""
    low = jnp.broadcast_to(-high, x.shape)
    (out,) = plt.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=[x, jnp.full(x.shape, factor, jnp.float32), low],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out
