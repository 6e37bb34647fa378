"""Prefill attention on a TPU: many query tokens of a row at once, against the row's blocks.

The T axis is cut at multiples of a query tile. A tile that holds tokens of several rows is visited
once for each of them; a visit computes the whole tile and keeps the tokens of its row. A token's
bits do not depend on the other rows of its tile: no step mixes them. README.md beside this
file draws it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.layout import PagedBatch
from pallas_kernels.tpu.device import (
    LANES,
    check_pool,
    num_cores,
    simulator,
    streaming_params,
    whole_lanes,
)
from pallas_kernels.tpu.ring import Ring, Walk, clear_unseen
from pallas_kernels.tpu.softmax import Head, Softmax, absorb, compute_dtype, head_lanes
from pallas_kernels.tpu.tiles import KvTile, block_bytes, longest_tile, tuned_tile, usual_ring

# Of the KV heads that are computed on at once. Four times what the registers hold: one head's steps
# wait for each other more than what is put aside costs (benchmarks.tpu_static).
MAX_LOGITS = 256 << 10
MIN_TOKENS = 16  # a register of bfloat16 has 16 sublanes
MAX_TOKENS = 64
CONTEXT_TOKENS = 256
QUERIES_BYTES = 6 << 20  # with a ring of tiles they fit the 16 MiB of a v5e program
TILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedTile(KvTile):
    """How the kernel is cut: also the tokens of a query tile."""

    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.tokens % MIN_TOKENS:
            raise ValueError(
                f"a query tile must have a multiple of {MIN_TOKENS} tokens, got {self.tokens}"
            )


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
    tile: RaggedTile | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch whose decode rows are `decoded` already.

    Slots behind a row's length or before all its windows and blocks that no row names may hold
    NaN. Ids of live blocks must be in the pool and lengths in the tables: the hardware does not
    look. Padding tokens get zeros. With `interpret` a TPU is simulated, as `InterpretParams` say.
    """
    T, _, H = q.shape
    W = pool.shape[3]
    check_pool(pool.shape[2], pool.dtype)
    tile = tile or choose_tile(q, pool, batch.block_tables.shape[1])
    q_NTW = jnp.pad(
        q.transpose(1, 0, 2).astype(compute_dtype(q, pool)),
        [(0, 0), (0, -T % tile.tokens), (0, head_lanes(W) - H)],
    )
    visits, num_visits = _list_visits(batch, num_tokens=T, tile_tokens=tile.tokens)
    out_NTV = ragged_call(
        visits,
        num_visits,
        batch.block_tables[:, None, :],
        q_NTW,
        pool,
        None if sinks is None else sinks.astype(jnp.float32)[:, None, None],
        kv_scales,
        out_dtype=q.dtype,
        tile=tile,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        interpret=simulator(interpret),
    )
    out = out_NTV[:, :T, -H:].transpose(1, 0, 2).astype(q.dtype)
    return _with_decoded(out, batch, decoded)


def choose_tile(
    q: Float[Array, "T N H"], pool: Real[Array, "P K S W"], max_blocks: int
) -> RaggedTile:
    """The table's tile, cut to the tokens and the block tables, or the default."""
    T, N, H = q.shape
    _, K, S, _ = pool.shape
    fields = tuned_tile("prefill", heads=(N, K, H), pool=pool)
    if fields is None or q.dtype.itemsize > 2:  # the table's fit VMEM with 16-bit queries
        return default_tile(q, pool)
    tile = RaggedTile(**fields)
    return dataclasses.replace(
        tile,
        tokens=min(tile.tokens, pl.cdiv(T, MIN_TOKENS) * MIN_TOKENS),
        blocks=min(tile.blocks, longest_tile(S, max_blocks)),
    )


def default_tile(q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]) -> RaggedTile:
    """As many tokens as their queries, answers and sums leave room for in VMEM."""
    T, N, _ = q.shape
    S, W = pool.shape[2:]
    lanes = whole_lanes(head_lanes(W))
    # Queries and answers twice, since the next ones arrive meanwhile; values; two columns.
    token_bytes = N * (lanes * (4 * q.dtype.itemsize + 4) + 2 * 4 * LANES)
    tokens = min(max(QUERIES_BYTES // token_bytes, MIN_TOKENS), MAX_TOKENS)
    tokens = min(1 << (tokens.bit_length() - 1), pl.cdiv(T, MIN_TOKENS) * MIN_TOKENS)
    blocks = max(1, min(CONTEXT_TOKENS // S, TILE_BYTES // block_bytes(pool)))
    return RaggedTile(tokens=tokens, blocks=blocks, ring=usual_ring(pool, TILE_BYTES))


def _with_decoded(
    out: Float[Array, "T N H"], batch: PagedBatch, decoded: Float[Array, "B N H"]
) -> Float[Array, "T N H"]:
    """The answers of decode rows in place of theirs, and zeros for what nobody computed."""
    T, B = out.shape[0], decoded.shape[0]
    tokens_T11 = jnp.arange(T)[:, None, None]
    out = jnp.where(tokens_T11 < batch.query_starts[-1], out, 0)
    decoded = jnp.pad(decoded.astype(out.dtype), [(0, T - B), (0, 0), (0, 0)])
    return jnp.where(tokens_T11 < batch.num_decodes, decoded, out)


def _list_visits(
    batch: PagedBatch, *, num_tokens: int, tile_tokens: int
) -> tuple[Int32[Array, "X 5"], Int32[Array, ""]]:
    """Each visit's query tile, row, first token, end of tokens, and the token at position 0.

    In the order of tokens, so that visits of one tile follow each other; one visit of nothing
    where there are no prompts. Nothing is scanned, as a scan is many kernels.
    """
    B = batch.seq_lens.shape[0]
    starts_B, ends_B = batch.query_starts[:-1], batch.query_starts[1:]
    rows = jnp.arange(B)
    has_prompt = (rows >= batch.num_decodes) & (ends_B > starts_B)
    first_tiles_B = starts_B // tile_tokens
    tiles_B = jnp.where(has_prompt, (ends_B - 1) // tile_tokens - first_tiles_B + 1, 0)
    visit_ends_B = jnp.sum(jnp.where(rows[None, :] <= rows[:, None], tiles_B[None, :], 0), axis=1)
    max_visits = pl.cdiv(num_tokens, tile_tokens) + B
    visit = jnp.arange(max_visits)
    row = jnp.sum(visit_ends_B[None, :] <= visit[:, None], axis=1)
    is_live = row < B
    row = jnp.minimum(row, B - 1)
    tile = first_tiles_B[row] + visit - visit_ends_B[row] + tiles_B[row]
    tile = jnp.where(is_live, tile, 0)
    first = jnp.maximum(starts_B[row], tile * tile_tokens)
    end = jnp.where(is_live, jnp.minimum(ends_B[row], (tile + 1) * tile_tokens), first)
    # A visit of nothing is at position 0, where there is no context to fetch.
    zero = jnp.where(is_live, ends_B[row] - batch.seq_lens[row], first)
    visits = jnp.stack([tile, row, first, end, zero], axis=1).astype(jnp.int32)
    return visits, jnp.maximum(visit_ends_B[-1], 1).astype(jnp.int32)


def ragged_call(
    visits: Int32[Array, "X 5"],
    num_visits: Int32[Array, ""] | int,
    block_tables: Int32[Array, "B 1 M"],
    q: Float[Array, "N T V"],
    pool: Real[Array, "P K S W"],
    sinks: Float[Array, "N 1 1"] | None,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    out_dtype: jnp.dtype,
    tile: RaggedTile,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    static_context: int | None = None,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N T V"]:
    """The kernel over a grid of visits; the pool stays where it is.

    Where the heads divide so, each core has its share of them, in every visit.
    """
    N, T, V = q.shape
    _, K, S, W = pool.shape
    M, last = block_tables.shape[2], visits.shape[0] - 1
    cores = cores_of_heads(K, interpret)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)

    def table(step: int) -> pl.BlockSpec:
        def place(core, visit, visits_ref):  # noqa: ARG001
            return visits_ref[jnp.minimum(visit + step, last), 1], 0, 0

        return pl.BlockSpec((None, 1, M), place, memory_space=pltpu.SMEM)

    heads = pl.BlockSpec(
        (N // cores, tile.tokens, V),
        lambda core, visit, visits_ref: (core, visits_ref[visit, 0], 0),
    )
    column = pltpu.VMEM((N // cores, tile.tokens, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _ragged_kernel,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            static_context=static_context,
        ),
        name="paged_prefill",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, num_visits),
            in_specs=[
                table(0),
                table(1),
                heads,
                pl.BlockSpec(memory_space=pl.ANY),
                None
                if sinks is None
                else pl.BlockSpec((N // cores, 1, 1), lambda core, *_: (core, 0, 0)),
                None if kv_scales is None else smem,
            ],
            out_specs=heads,
            scratch_shapes=[
                pltpu.VMEM((tile.ring, K // cores, tile.blocks * S, W), pool.dtype),
                pltpu.SemaphoreType.DMA((tile.ring,)),
                pltpu.SMEM((1,), jnp.int32),
                column,
                column,
                pltpu.VMEM((N // cores, tile.tokens, V), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((N, T, V), out_dtype),
        compiler_params=streaming_params(tile.ring_bytes(pool), interpret),
        interpret=interpret,
    )(visits, block_tables, block_tables, q, pool, sinks, kv_scales)


def _ragged_kernel(
    visits_ref,  # i32[X, 5] in SMEM: query tile, row, first token, end, the token at position 0
    table_ref,  # i32[1, M] in SMEM, of this visit's row
    next_table_ref,  # i32[1, M] in SMEM, of the next visit's row
    q_ref,  # [N, Q, V], zero behind the first H lanes
    pool_ref,  # [P, KV heads, S, W] in HBM
    sinks_ref,  # f32[N, 1, 1], or None
    kv_scales_ref,  # f32[2, K] in SMEM, or None
    o_ref,  # [N, Q, V], the result in the last H lanes
    kv_ref,  # [ring, K, C, W], scratch: a tile of C tokens each
    arrived_ref,  # DMA semaphores [ring]
    turn_ref,  # i32[1] in SMEM
    high_ref,  # f32[N, Q, LANES]
    total_ref,  # f32[N, Q, LANES]
    values_ref,  # f32[N, Q, V]
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    static_context: int | None,
):
    """One visit: a query tile's tokens of one row, against what they see of its context."""
    N, Q, _ = q_ref.shape
    _, K, C, _ = kv_ref.shape
    G = N // K
    at_once = heads_at_once(K, G * Q * C)
    visit, last = pl.program_id(1), visits_ref.shape[0] - 1
    first_kv_head = pl.program_id(0) * K
    softmax = Softmax(high_ref, total_ref, values_ref)
    tile, _, my_first, my_end, zero = (visits_ref[visit, field] for field in range(5))
    if static_context is not None:
        my_first, my_end, zero = static_context, static_context, 0

    def walk(visit, table) -> Walk:
        """What the tokens of a visit see, all together; behind the last visit, nothing."""
        if static_context is not None:
            return Walk(table, 0, static_context)
        first, end, zero = (visits_ref[jnp.minimum(visit, last), field] for field in (2, 3, 4))
        start = 0 if window is None else jnp.maximum(first - zero - window + 1, 0)
        return Walk(table, start, jnp.where(visit < pl.num_programs(1), end - zero, start))

    this, following = walk(visit, table_ref), walk(visit + 1, next_table_ref)

    def absorb_tile(kv_tile, kv_tile_ref, _meanwhile) -> None:
        first = kv_tile * C
        clear_unseen(kv_tile_ref, first, this)
        queries_QC = tile * Q - zero + jax.lax.broadcasted_iota(jnp.int32, (Q, C), 0)
        keys_QC = first + jax.lax.broadcasted_iota(jnp.int32, (Q, C), 1)
        visible_QC = keys_QC <= queries_QC
        if window is not None:
            visible_QC &= keys_QC > queries_QC - window

        def absorb_heads(turn, _) -> None:
            heads = []
            for kv_head in (turn * at_once + i for i in range(at_once)):
                kv_ref = kv_tile_ref.at[kv_head]
                factor = (
                    scale
                    if kv_scales_ref is None
                    else scale * kv_scales_ref[0, first_kv_head + kv_head]
                )
                places = [kv_head * G + query for query in range(G)]
                heads += [Head(place, q_ref[place], kv_ref, factor) for place in places]
            absorb(softmax, heads, visible_QC, soft_cap=soft_cap)

        jax.lax.fori_loop(0, K // at_once, absorb_heads, None)

    softmax.reset(sinks_ref)
    ring = Ring(pool_ref, kv_ref, arrived_ref, turn_ref, first_kv_head)
    ring.stream(this, following, absorb_tile, is_first=visit == 0)

    tokens_Q1 = tile * Q + jax.lax.broadcasted_iota(jnp.int32, (Q, 1), 0)
    mine_Q1 = (tokens_Q1 >= my_first) & (tokens_Q1 < my_end)

    def answer(head, _) -> None:
        values = softmax.result(head)
        if kv_scales_ref is not None:
            values *= kv_scales_ref[1, first_kv_head + head // G]
        # Another row's tokens keep what its visit has given them. What no visit owns is undefined
        # here; `_with_decoded` replaces it.
        others = o_ref[head].astype(jnp.float32)
        o_ref[head] = jnp.where(mine_Q1, values, others).astype(o_ref.dtype)

    jax.lax.fori_loop(0, N, answer, None)


def cores_of_heads(num_kv_heads: int, interpret: bool | pltpu.InterpretParams) -> int:
    """The cores that share a visit's KV heads: all, or one where they do not divide."""
    cores = num_cores(interpret)
    return cores if num_kv_heads % cores == 0 else 1


def heads_at_once(num_kv_heads: int, logits: int) -> int:
    """Of KV heads with so many logits each; they must divide the heads."""
    most = max(1, MAX_LOGITS // logits)
    return max(
        size for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0 and size <= most
    )
