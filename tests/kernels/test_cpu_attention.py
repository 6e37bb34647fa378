"""The C++ kernel: the same bits whoever shares a batch, and an error where numbers lead outside."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Backend, PagedBatch, paged_attention
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import (
    BACKENDS,
    SCALE,
    Case,
    attend,
    dense,
    make_case,
    quantized,
    rounded,
    run,
)

ROWS = [(1, 1), (1, 150), (7, 23), (19, 141), (40, 40)]
LONG_ROWS = [*ROWS, (1, 300), (20, 299)]  # of whole tiles and more
OPTIONS = [{}, {"window": 21, "soft_cap": 1.5}]

# jit raises the one where it waited for the call, an array the other where it is read.
ERRORS = (ValueError, jax.errors.JaxRuntimeError)

pytestmark = pytest.mark.skipif(Backend.CPU not in BACKENDS, reason="needs a C++ compiler")


def alone(case: Case, row: int) -> Case:
    """One of the rows, without the others."""
    batch = case.batch
    start, end = batch.query_starts[row : row + 2]
    own = PagedBatch(
        batch.block_tables[row : row + 1],
        jnp.stack([0 * start, end - start]),
        batch.seq_lens[row : row + 1],
        (end - start == 1).astype(jnp.int32),
    )
    return dataclasses.replace(case, q=case.q[start:end], batch=own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_alone_and_in_a_batch_is_the_same_bit_for_bit(options: dict[str, Any], dtype: str):
    case = make_case(LONG_ROWS)
    if dtype in {"int8", "float8_e4m3fn"}:
        case, kv_scales = quantized(case, dtype)
        options = {**options, "kv_scales": kv_scales, "sinks": np.arange(6, dtype=np.float32)}
    else:
        case = dataclasses.replace(case, pool=case.pool.astype(dtype))
    together = run(case, Backend.CPU, **options)
    starts = np.asarray(case.batch.query_starts)
    for row in range(len(LONG_ROWS)):
        own = run(alone(case, row), Backend.CPU, **options)
        np.testing.assert_array_equal(together[starts[row] : starts[row + 1]], own)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_blocks_lie_and_how_long_they_are_changes_no_bit(options: dict[str, Any]):
    expected, *others = (
        run(make_case(LONG_ROWS, block_size=block_size), Backend.CPU, **options)
        for block_size in (8, 1, 5, 32)
    )
    for other in others:
        np.testing.assert_array_equal(other, expected)


def test_threads_that_share_the_work_change_no_bit():
    case = make_case(ROWS, heads=(9, 3, 64))
    expected = run(case, Backend.CPU)
    for _ in range(20):
        np.testing.assert_array_equal(run(case, Backend.CPU), expected)


def test_a_float16_query_over_a_float32_pool_agrees_with_dense_attention():
    case = rounded(make_case(ROWS), "float16")
    out = run(dataclasses.replace(case, q=case.q.astype(np.float16)), Backend.CPU)
    assert out.dtype == np.float16
    assert_close(out, dense(case)[: len(out)], TOLERANCES["float16"].attention)


def test_a_pool_of_another_dtype_is_refused():
    case = make_case(ROWS)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn pool, got float16; use xla"):
        run(dataclasses.replace(case, pool=case.pool.astype(np.float16)), Backend.CPU)


def test_vmap_gives_what_a_loop_gives():
    cases = [make_case(ROWS, seed=seed) for seed in range(3)]
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.batch for case in cases))
    q, pool = np.stack([case.q for case in cases]), np.stack([case.pool for case in cases])

    def attend(q: jax.Array, pool: jax.Array, batch: PagedBatch) -> jax.Array:
        return paged_attention(q, pool, batch, scale=SCALE, backend=Backend.CPU)

    found = jax.vmap(attend)(jnp.asarray(q), jnp.asarray(pool), batches)
    for case, out in zip(cases, found, strict=True):
        expected = run(case, Backend.CPU)
        np.testing.assert_array_equal(np.asarray(out)[: len(expected)], expected)
    # A pool that all share, as when one context answers several queries.
    found = jax.vmap(attend, in_axes=(0, None, None))(
        jnp.asarray(q), jnp.asarray(cases[0].pool), cases[0].batch
    )
    for case, out in zip(cases, found, strict=True):
        expected = run(dataclasses.replace(cases[0], q=case.q), Backend.CPU)
        np.testing.assert_array_equal(np.asarray(out)[: len(expected)], expected)


# The pool has 49 blocks of 8, a table 21 columns; rows 5 and 6 are padding, and q has 71 tokens.
@pytest.mark.parametrize(
    ("name", "place", "number", "message"),
    [
        ("block_tables", (1, 0), 49, "a block id of row 1 must be from 0 to 48, got 49"),
        ("block_tables", (1, 18), -1, "a block id of row 1 must be from 0 to 48, got -1"),
        ("block_tables", (4, 4), 2**31 - 1, "of row 4 must be from 0 to 48, got 2147483647"),
        ("seq_lens", 1, 169, "seq_lens of row 1 must be from 0 to 168, got 169"),
        ("seq_lens", 3, 2**31 - 1, "seq_lens of row 3 must be from 0 to 168, got 2147483647"),
        ("seq_lens", 2, -1, "seq_lens of row 2 must be from 0 to 168, got -1"),
        ("query_starts", 0, 2, "the start of row 0 must be from 0 to 0, got 2"),
        ("query_starts", 0, -2, "the start of row 0 must be from 0 to 0, got -2"),
        ("query_starts", 3, 1, "the end of row 2 must be from 2 to 71, got 1"),
        ("query_starts", 5, 2**31 - 1, "the end of row 4 must be from 28 to 71, got 2147483647"),
        ("query_starts", 7, 72, "the end of row 6 must be from 68 to 71, got 72"),
    ],
)
def test_numbers_that_lead_outside_the_arrays_are_refused_and_the_next_call_works(
    name: str, place: Any, number: int, message: str
):
    case = make_case(ROWS)
    wrong = getattr(case.batch, name).at[place].set(number)
    batch = dataclasses.replace(case.batch, **{name: wrong})
    with pytest.raises(ERRORS, match=f"INVALID_ARGUMENT: .*{message}"):
        run(dataclasses.replace(case, batch=batch), Backend.CPU)
    out = run(case, Backend.CPU)
    assert_close(out, dense(case)[: len(out)], TOLERANCES["float32"].attention)


NUMBERS = st.integers(0, 8) | st.sampled_from([-(2**31), -1, 9, 11, 12, 20, 21, 2**31 - 1])


@settings(max_examples=300)
@given(
    tables=st.lists(NUMBERS, min_size=15, max_size=15),
    starts=st.lists(NUMBERS, min_size=3, max_size=3) | st.just([1, 4, 11]),
    lens=st.lists(NUMBERS, min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 7, 2**40]),
)
def test_any_numbers_give_finite_values_or_an_error(
    tables: list[int], starts: list[int], lens: list[int], window: int | None
):
    batch = PagedBatch(
        jnp.array(tables, jnp.int32).reshape(3, 5),
        jnp.array([0, *starts], jnp.int32),
        jnp.array(lens, jnp.int32),
        jnp.int32(0),
    )
    q, pool = np.ones((11, 6, 8), np.float32), np.ones((9, 2, 4, 16), np.float32)
    try:
        out = np.asarray(attend(q, pool, batch, scale=SCALE, window=window, backend=Backend.CPU))
    except ERRORS as error:
        assert "INVALID_ARGUMENT" in str(error)  # noqa: PT017
    else:
        assert np.isfinite(out).all()


def test_numbers_that_nothing_follows_may_be_any():
    window = 21
    case = make_case(ROWS)
    expected = run(case, Backend.CPU, window=window)
    tables, lens = np.array(case.batch.block_tables), np.array(case.batch.seq_lens)
    S = case.pool.shape[2]
    starts = np.asarray(case.batch.query_starts)
    for row, (queries, context) in enumerate(zip(np.diff(starts), lens, strict=True)):
        columns = np.arange(tables.shape[1])
        first = max(0, context - queries + 1 - window)
        tables[row, (columns * S >= context) | ((columns + 1) * S <= first)] = 10**9
    lens[len(ROWS) :] = 10**9  # rows without queries
    batch = dataclasses.replace(
        case.batch, block_tables=jnp.asarray(tables), seq_lens=jnp.asarray(lens)
    )
    found = run(dataclasses.replace(case, batch=batch), Backend.CPU, window=window)
    np.testing.assert_array_equal(found, expected)
