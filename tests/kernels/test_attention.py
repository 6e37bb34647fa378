"""Attention over the pool on a CPU: NumPy's dense attention == every backend that runs here.

Slots that no row owns hold NaN, and nothing of it may come out.
"""

import dataclasses
from typing import Any

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
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import BACKENDS, SCALE, Case, decode, dense, make_case, rounded, run

HEADS = [(6, 3, 16), (9, 3, 64), (4, 1, 32), (2, 2, 8)]
OPTIONS = [{"window": 5}, {"soft_cap": 1.5}, {"window": 19, "soft_cap": 3.0}]

INTERPRETED = [Backend.PALLAS_TPU_INTERPRET, Backend.PALLAS_GPU_INTERPRET]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


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
    # What is in the pool is exact in both dtypes, so neither may add an error of its own.
    exact = dataclasses.replace(rounded(case, "bfloat16"), q=case.q)
    expected = dense(exact)[: case.batch.query_starts[-1]]
    half = dataclasses.replace(exact, pool=exact.pool.astype(dtype))
    for backend in BACKENDS:
        # `xla` rounds the query to the pool's dtype, as a matrix unit wants it.
        works_in = dtype if backend is Backend.XLA else "float32"
        assert_close(run(half, backend), expected, TOLERANCES[works_in].attention, backend.value)


@pytest.mark.parametrize("block_size", [1, 5, 24])
def test_blocks_of_any_size_agree_with_dense_attention(block_size: int):
    case = make_case([(1, 29), (11, 40)], heads=(7, 1, 20), block_size=block_size)
    assert_backends_agree(case, window=9, soft_cap=2.5)


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
def test_write_kv_puts_each_token_in_its_slot_and_padding_nowhere_else(backend: Backend):
    case = make_case([(1, 12), (5, 19)], block_size=8)
    T, (_, K, S, W) = len(case.q), case.pool.shape
    rows = rows_of_tokens(case.batch, T)
    positions = positions_of_tokens(case.batch, rows)
    slots = slots_of_tokens(case.batch, rows, positions, block_size=S)
    kv = np.random.default_rng(1).standard_normal((T, K, W)).astype(np.float32)
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
    places = [(0, 11), *((1, position) for position in range(14, 19))]
    for token, (row, position) in enumerate(places):
        expected[tables[row, position // S], :, position % S] = kv[token]
    np.testing.assert_array_equal(written[1:], expected[1:])  # the null block may hold anything


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


@pytest.mark.parametrize("backend", [*BACKENDS, *INTERPRETED])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((7, 5, 16))}, "multiple of KV heads, got 5 and 3; a query is"),
        ({"q": jnp.zeros((7, 6, 8))}, "2 x 8 lanes for this query, got 32; make the pool with"),
        ({"pool": jnp.zeros((4, 0, 8, 32))}, "multiple of KV heads, got 6 and 0"),
        ({"pool": jnp.zeros((4, 3, 0, 32))}, r"at least one slot, got a pool of \(4, 3, 0, 32\)"),
        ({"scale": 0.0}, "scale must be from 1e-06 to 1e[+]06, got 0.0; it is 1 / sqrt"),
        ({"scale": float("nan")}, "scale must be .*, got nan"),
        ({"window": 0}, r"window must be at least 1 \(the token itself\), got 0; None is"),
        ({"window": -3}, "window must be at least 1 .*, got -3"),
        ({"soft_cap": 0.0}, "soft_cap must be positive and finite .*, got 0.0; None is"),
        ({"soft_cap": -2.0}, "soft_cap must be positive"),
        ({"soft_cap": 1e-50}, "in float32, got 1e-50"),  # would be 0 there
        ({"soft_cap": float("inf")}, "got inf"),
        ({"soft_cap": float("nan")}, "got nan"),
    ],
    ids=str,
)
def test_what_has_no_answer_is_refused_by_every_backend_alike(
    backend: Backend, change: dict[str, Any], message: str
):
    case = make_case([(1, 9), (3, 11)], num_padding=1)
    arguments: dict[str, Any] = {"q": jnp.asarray(case.q), "pool": jnp.asarray(case.pool)} | change
    q, pool = arguments.pop("q"), arguments.pop("pool")
    options = {"scale": SCALE, "backend": backend, **arguments}
    with pytest.raises(ValueError, match=message):
        paged_attention(q, pool, case.batch, **options)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    with pytest.raises(ValueError, match=message):
        paged_decode(q[: len(lens)], pool, tables, lens, **options)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": jnp.array([9], jnp.int32)}, "3 block tables needs 4 .* got 4 and 1"),
        ({"query_starts": jnp.array([0, 1], jnp.int32)}, "3 block tables .* got 2 and 3"),
        ({"block_tables": jnp.zeros((2, 4), jnp.int32)}, "2 block tables .* got 4 and 3"),
    ],
    ids=["seq_lens", "query_starts", "block_tables"],
)
def test_a_batch_whose_rows_do_not_match_is_refused(
    backend: Backend, change: dict[str, Any], message: str
):
    case = make_case([(1, 9), (3, 11)], num_padding=1)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(case, batch=dataclasses.replace(case.batch, **change)), backend)


@each_backend
def test_fewer_tokens_than_rows_are_refused(backend: Backend):
    case = make_case([(1, 9), (3, 11)], num_padding=1)
    with pytest.raises(ValueError, match=r"a token for each of 3 rows, got 2; pad its T axis"):
        run(dataclasses.replace(case, q=case.q[:2]), backend)


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
