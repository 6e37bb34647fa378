"""Attention over the pool on a CPU: NumPy's dense attention == every backend that runs here.

Slots that no row owns hold NaN, and nothing of it may come out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    Backend,
    PagedBatch,
    paged_attention,
    paged_decode,
    positions_of_tokens,
    rows_of_tokens,
    slots_of_tokens,
    write_kv,
    xla,
)
from pallas_kernels.cpu.build import BuildError, library
from tests.helpers import TOLERANCES, assert_close

HEADS = [(6, 3, 16), (9, 3, 64), (4, 1, 32), (2, 2, 8)]
OPTIONS = [{"window": 5}, {"soft_cap": 1.5}, {"window": 19, "soft_cap": 3.0}]
SCALE = 0.3


def _backends_here() -> list[Backend]:
    """Those that run on a CPU; `cpu` where there is a C++ compiler."""
    try:
        library()
    except BuildError:
        return [Backend.REFERENCE, Backend.XLA]
    return [Backend.REFERENCE, Backend.XLA, Backend.CPU]


BACKENDS = _backends_here()
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclasses.dataclass(frozen=True)
class Case:
    """Some rows' queries over a pool whose other slots are NaN, and each row's own K and V."""

    q: np.ndarray
    pool: np.ndarray
    batch: PagedBatch
    contexts: list[np.ndarray]  # of each row, [C, K, 2H]


def make_case(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int, int] = (6, 3, 16),
    block_size: int = 8,
    num_padding: int = 2,
    seed: int = 0,
) -> Case:
    """Rows of (queries, context); their blocks are shuffled, and the padding comes last."""
    N, K, H = heads
    S, rng = block_size, np.random.default_rng(seed)
    rows = sorted(rows, key=lambda row: row[0] != 1)
    num_blocks = 3 + sum(-(-context // S) for _, context in rows)
    ids = iter(rng.permutation(np.arange(1, num_blocks)))
    num_columns = 2 + max(-(-context // S) for _, context in rows)
    tables = np.zeros((len(rows) + num_padding, num_columns), np.int32)
    pool = np.full((num_blocks, K, S, 2 * H), np.nan, np.float32)
    contexts = []
    for row, (_, context) in enumerate(rows):
        kv = rng.standard_normal((context, K, 2 * H)).astype(np.float32)
        contexts.append(kv)
        for token in range(context):
            column, offset = divmod(token, S)
            if offset == 0:
                tables[row, column] = next(ids)
            pool[tables[row, column], :, offset] = kv[token]
    starts = np.cumsum([0, *(queries for queries, _ in rows), *[0] * num_padding])
    lens = [*(context for _, context in rows), *[0] * num_padding]
    q = rng.standard_normal((starts[-1] + 3, N, H)).astype(np.float32)  # three padding tokens
    num_decodes = sum(queries == 1 for queries, _ in rows)
    batch = PagedBatch(
        jnp.asarray(tables),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lens, jnp.int32),
        jnp.int32(num_decodes),
    )
    return Case(q, pool, batch, contexts)


def dense(case: Case, *, window: int | None = None, soft_cap: float | None = None) -> np.ndarray:
    """The same in float64 over each row's context; zeros where a token has no row."""
    _, N, H = case.q.shape
    K = case.pool.shape[1]
    out = np.zeros(case.q.shape)
    starts = np.asarray(case.batch.query_starts)
    for row, kv in enumerate(case.contexts):
        C = len(kv)
        for token in range(starts[row], starts[row + 1]):
            position = C - starts[row + 1] + token
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(N):
                seen = kv[first : position + 1, head // (N // K)].astype(np.float64)
                logits = seen[:, :H] @ case.q[token, head].astype(np.float64) * SCALE
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                weights = np.exp(logits - logits.max())
                out[token, head] = weights @ seen[:, H:] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def attend(q: Any, pool: Any, batch: PagedBatch, **options: Any) -> jax.Array:
    return paged_attention(q, pool, batch, **options)


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def decode(q: Any, pool: Any, tables: Any, lens: Any, **options: Any) -> jax.Array:
    return paged_decode(q, pool, tables, lens, **options)


def run(case: Case, backend: Backend, **options: Any) -> np.ndarray:
    """The backend's attention; what stands in padding tokens is of no concern."""
    out = attend(case.q, case.pool, case.batch, scale=SCALE, backend=backend, **options)
    return np.asarray(out)[: case.batch.query_starts[-1]]


def assert_backends_agree(case: Case, **options: Any) -> None:
    expected = dense(case, **options)[: case.batch.query_starts[-1]]
    for backend in BACKENDS:
        out = run(case, backend, **options)
        assert_close(out, expected, TOLERANCES["float32"].attention, backend.value)


@pytest.mark.parametrize(
    ("heads", "options"),
    [*((heads, {}) for heads in HEADS), *((HEADS[0], options) for options in OPTIONS)],
    ids=str,
)
def test_ragged_rows_agree_with_dense_attention(
    heads: tuple[int, int, int], options: dict[str, Any]
):
    rows = [(1, 1), (1, 17), (1, 24), (7, 7), (3, 30), (13, 21)]
    assert_backends_agree(make_case(rows, heads=heads), **options)


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_contexts_longer_than_a_tile_agree_with_dense_attention(block_size: int):
    over_queries, over_context = xla.QUERY_TOKENS + 5, xla.CONTEXT_TOKENS + 9
    rows = [(1, xla.DECODE_TOKENS), (1, 2 * xla.DECODE_TOKENS + 3), (over_queries, over_context)]
    case = make_case(rows, heads=(4, 1, 8), block_size=block_size)
    assert_backends_agree(case)
    assert_backends_agree(case, window=xla.DECODE_TOKENS + 11)


@pytest.mark.parametrize("head_size", [8, 40, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_sizes_and_dtypes_of_the_pool_agree_with_dense_attention(head_size: int, dtype: str):
    """The C++ kernel has code of its own for 64, for 128, for the others and for each dtype."""
    case = make_case([(1, 150), (5, 21), (19, 19)], heads=(6, 2, head_size))
    pool = case.pool.astype(jnp.bfloat16).astype(np.float32)
    # What is in the pool is exact in both dtypes, so neither may add an error of its own.
    contexts = [kv.astype(jnp.bfloat16).astype(np.float32) for kv in case.contexts]
    exact = dataclasses.replace(case, pool=pool, contexts=contexts)
    expected = dense(exact)[: case.batch.query_starts[-1]]
    half = dataclasses.replace(exact, pool=pool.astype(dtype))
    for backend in BACKENDS:
        # `xla` rounds the query to the pool's dtype, as a matrix unit wants it.
        works_in = dtype if backend is Backend.XLA else "float32"
        assert_close(run(half, backend), expected, TOLERANCES[works_in].attention, backend.value)


@each_backend
def test_the_answer_has_the_querys_dtype_whatever_the_pools(backend: Backend):
    case = make_case([(1, 17), (7, 23)])
    out = run(dataclasses.replace(case, q=case.q.astype(jnp.bfloat16)), backend)
    assert out.dtype == jnp.bfloat16
    expected = dense(case)[: len(out)]
    assert_close(out.astype(np.float32), expected, TOLERANCES["bfloat16"].attention)


def test_more_decode_rows_than_a_group_agree_with_dense_attention():
    rows = [(1, 1 + 5 * row) for row in range(xla.DECODE_ROWS + 3)]
    assert_backends_agree(make_case(rows, heads=(2, 1, 8)), window=6)


# Padding keeps every example in the same few programs.
@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_random_ragged_batches_agree_with_dense_attention(rows: list[tuple[int, int]], seed: int):
    case = make_case([(n, n + before) for n, before in rows], num_padding=6 - len(rows), seed=seed)
    width, num_blocks = 8 - case.batch.block_tables.shape[1], 32 - case.pool.shape[0]
    padded = dataclasses.replace(
        case,
        q=np.pad(case.q, [(0, 64 - len(case.q)), (0, 0), (0, 0)]),
        pool=np.pad(case.pool, [(0, num_blocks), *[(0, 0)] * 3], constant_values=np.nan),
        batch=dataclasses.replace(
            case.batch, block_tables=jnp.pad(case.batch.block_tables, [(0, 0), (0, width)])
        ),
    )
    assert_backends_agree(padded)


@each_backend
@pytest.mark.parametrize("options", [{}, *OPTIONS[:1]], ids=str)
def test_decode_is_attention_of_one_token_rows_and_empty_rows_give_zeros(
    backend: Backend, options: dict[str, Any]
):
    case = make_case([(1, 1), (1, 19), (1, 8), (1, 33), (1, 5)])
    lens = case.batch.seq_lens
    empty = lens.at[1].set(0)  # in the middle, as well as the padding at the end
    out = decode(
        case.q[: len(lens)],
        case.pool,
        case.batch.block_tables,
        empty,
        scale=SCALE,
        backend=backend,
        **options,
    )
    expected = dense(case, **options)[: len(lens)]
    expected[np.asarray(empty) == 0] = 0
    assert_close(out, expected, TOLERANCES["float32"].attention)
    np.testing.assert_array_equal(np.asarray(out)[np.asarray(empty) == 0], 0)


@each_backend
def test_a_row_does_not_depend_on_its_neighbours(backend: Backend):
    case = make_case([(6, 21), (9, 14), (5, 40)])
    batch = case.batch
    alone = PagedBatch(
        batch.block_tables[:1], batch.query_starts[:2], batch.seq_lens[:1], batch.num_decodes
    )
    expected = run(dataclasses.replace(case, q=case.q[:6], batch=alone), backend)
    assert_close(run(case, backend)[:6], expected, TOLERANCES["float32"].attention)


@each_backend
def test_write_kv_puts_each_token_in_its_slot_and_padding_in_the_null_block(backend: Backend):
    case = make_case([(1, 12), (5, 19)], block_size=8)
    T, (_, K, S, W) = len(case.q), case.pool.shape
    rows = rows_of_tokens(case.batch, T)
    positions = positions_of_tokens(case.batch, rows)
    slots = slots_of_tokens(case.batch, rows, positions, block_size=S)
    kv = np.random.default_rng(1).standard_normal((T, K, W)).astype(np.float32)
    kv[6:] = 0  # padding writes zeros
    written = np.asarray(
        write_kv(
            jnp.asarray(case.pool),
            jnp.asarray(kv[..., : W // 2]),
            jnp.asarray(kv[..., W // 2 :]),
            slots,
            backend=backend,
        )
    )
    expected, tables = case.pool.copy(), np.asarray(case.batch.block_tables)
    expected[0, :, 0] = 0
    places = [(0, 11), *((1, position) for position in range(14, 19))]
    for token, (row, position) in enumerate(places):
        expected[tables[row, position // S], :, position % S] = kv[token]
    np.testing.assert_array_equal(written, expected)


@each_backend
def test_bfloat16_agrees_with_float32_within_its_tolerance(backend: Backend):
    case = make_case([(1, 17), (7, 23)])
    half = dataclasses.replace(
        case, q=case.q.astype(jnp.bfloat16), pool=case.pool.astype(jnp.bfloat16)
    )
    out = run(half, backend)
    assert out.dtype == jnp.bfloat16
    expected = dense(case)[: len(out)]
    assert_close(out.astype(np.float32), expected, TOLERANCES["bfloat16"].attention)


@each_backend
def test_a_wrong_shape_is_refused(backend: Backend):
    case = make_case([(1, 9), (4, 11)])
    options = {"scale": SCALE, "backend": backend}
    with pytest.raises(jaxtyping.TypeCheckError):  # head size
        paged_attention(jnp.asarray(case.q)[None], jnp.asarray(case.pool), case.batch, **options)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    q = jnp.asarray(case.q[: len(lens)])
    with pytest.raises(jaxtyping.TypeCheckError):  # a length too few
        paged_decode(q, jnp.asarray(case.pool), tables, lens[:-1], **options)
