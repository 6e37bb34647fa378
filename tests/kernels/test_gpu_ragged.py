"""The ragged GPU kernel in Pallas's interpret mode, against NumPy's dense attention.

Slots that no row owns hold NaN, and nothing of it may come out.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PagedBatch
from pallas_kernels.gpu import ragged
from pallas_kernels.gpu.ragged import RaggedConfig
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import SCALE, Case, dense, make_case, padded, rounded

TINY = RaggedConfig(query_rows=16, context_tokens=16, num_warps=1, num_stages=1)
OPTIONS = [{}, {"window": 5}, {"soft_cap": 1.5}, {"window": 19, "soft_cap": 3.0}]
# Tiles of TINY begin and end everywhere in these, and two of the rows are decode rows.
ROWS = [(1, 1), (1, 37), (7, 7), (3, 30), (45, 80), (2, 17), (16, 16), (33, 33)]


# XLA takes most of the time here, and what it makes runs once.
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


@functools.partial(
    jax.jit,
    static_argnames=("scale", "window", "soft_cap", "config"),
    compiler_options=QUICKLY,
)
def prefill(q: Any, pool: Any, batch: PagedBatch, decoded: Any, **options: Any) -> jax.Array:
    return ragged.paged_prefill(q, pool, batch, decoded, interpret=True, **options)


def run(case: Case, **options: Any) -> np.ndarray:
    """The kernel's answer, padding included; it is told that decode rows are their own query."""
    decoded = case.q[: len(case.batch.seq_lens)]
    return np.asarray(prefill(case.q, case.pool, case.batch, decoded, scale=SCALE, **options))


def assert_agrees(case: Case, dtype: str = "float32", **options: Any) -> None:
    """Prefill rows are dense attention, the others what they were given, padding is finite."""
    expected = dense(case, **{name: options[name] for name in options if name != "config"})
    num_decodes = int(case.batch.num_decodes)
    expected[:num_decodes] = case.q[:num_decodes]
    cast = dataclasses.replace(case, q=case.q.astype(dtype), pool=case.pool.astype(dtype))
    out = run(cast, **options)
    assert out.dtype == jnp.dtype(dtype)
    assert np.isfinite(out.astype(np.float32)).all()
    num_tokens = int(case.batch.query_starts[-1])
    out, expected = out[:num_tokens].astype(np.float32), expected[:num_tokens]
    assert_close(out, expected, TOLERANCES[dtype].attention)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixed_rows_agree_with_dense_attention(options: dict[str, Any]):
    assert_agrees(make_case(ROWS, heads=(6, 3, 16)), config=TINY, **options)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
def test_sinks_agree_with_dense_attention(options: dict[str, Any]):
    sinks = np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32)
    case = make_case(ROWS, heads=(6, 2, 16))  # a tile's last row of queries is nobody's
    assert_agrees(case, config=TINY, sinks=sinks, **options)


@pytest.mark.parametrize("heads", [(2, 2, 24), (14, 2, 8), (16, 1, 32)], ids=str)
def test_any_number_of_queries_a_head_agrees_with_dense_attention(heads: tuple[int, int, int]):
    assert_agrees(make_case(ROWS[:5], heads=heads), config=TINY, window=11)


@pytest.mark.parametrize(
    ("head_size", "dtype"), [(64, "float32"), (80, "bfloat16"), (128, "float16"), (256, "bfloat16")]
)
def test_head_sizes_and_dtypes_agree_with_dense_attention(head_size: int, dtype: str):
    case = make_case([(1, 9), (41, 150), (13, 13)], heads=(3, 1, head_size), block_size=16)
    assert_agrees(rounded(case, dtype), dtype)


@pytest.mark.parametrize("block_size", [24, 128])
def test_blocks_of_any_size_agree_with_dense_attention(block_size: int):
    case = make_case([(1, 29), (11, 40), (3, 130)], heads=(4, 1, 16), block_size=block_size)
    assert_agrees(case, config=TINY, window=33)


def test_one_long_row_agrees_with_dense_attention():
    assert_agrees(make_case([(300, 411)], heads=(4, 1, 8), num_padding=0), config=TINY)


def test_many_rows_of_two_tokens_agree_with_dense_attention():
    assert_agrees(make_case([(2, 2 + 3 * row) for row in range(40)], heads=(2, 1, 8)), config=TINY)


def test_decode_rows_are_what_the_caller_says_and_padding_its_own_query():
    case = make_case([(1, 9), (1, 3), (5, 12)], heads=(2, 1, 8), num_padding=1)
    decoded = np.random.default_rng(2).standard_normal((4, 2, 8)).astype(np.float32)
    out = prefill(case.q, case.pool, case.batch, decoded, scale=SCALE, config=TINY)
    np.testing.assert_array_equal(out[:2], decoded[:2])
    np.testing.assert_array_equal(out[7:], case.q[7:])


def test_the_answer_has_the_querys_dtype_whatever_the_pools():
    case = make_case([(1, 17), (7, 23)])
    mixed = dataclasses.replace(case, pool=case.pool.astype(jnp.bfloat16))
    out = run(mixed, config=TINY)
    assert out.dtype == np.float32
    assert_close(out[1:8], dense(case)[1:8], TOLERANCES["bfloat16"].attention)


# Padding keeps every example in one program.
@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_random_ragged_batches_agree_with_dense_attention(rows: list[tuple[int, int]], seed: int):
    rows = [(n, n + before) for n, before in rows]
    case = make_case(rows, num_padding=6 - len(rows), seed=seed)
    assert_agrees(padded(case, tokens=112, columns=9, blocks=40), config=TINY, window=23)


def test_a_tokens_bits_depend_on_its_tile_alone():
    """Not on the other rows, nor on how many of its row's tiles are in the chunk before it."""
    case = padded(make_case([(1, 9), (23, 61), (11, 50)]), tokens=80, columns=12, blocks=30)
    whole, batch = run(case, config=TINY)[1:24], case.batch
    for start in (0, 8, 16):  # a tile of TINY has 8 tokens here
        length = 23 - start
        alone = PagedBatch(
            jnp.roll(batch.block_tables, -1, axis=0),
            jnp.array([0] + [length] * len(batch.seq_lens), jnp.int32),
            jnp.zeros_like(batch.seq_lens).at[0].set(61),
            jnp.int32(0),
        )
        q = np.zeros_like(case.q)
        q[:length] = case.q[1 + start : 24]
        out = run(dataclasses.replace(case, q=q, batch=alone), config=TINY)
        np.testing.assert_array_equal(out[:length], whole[start:], str(start))


@settings(max_examples=50)
@given(lens=st.lists(st.integers(0, 40), min_size=7, max_size=7), decodes=st.integers(0, 7))
def test_every_prefill_token_is_in_one_tile(lens: list[int], decodes: int):
    lens = [1] * decodes + lens[decodes:]
    starts = np.cumsum([0, *lens])
    seq_lens = np.array(lens) + np.arange(7)
    batch = PagedBatch(
        jnp.zeros((7, 1), jnp.int32),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(seq_lens, jnp.int32),
        jnp.int32(decodes),
    )
    tiles = np.asarray(list_tiles(batch, num_tokens=7 * 40, query_tokens=6))
    found = [
        (row, first + i, position + i)
        for row, first, count, position in tiles.tolist()
        for i in range(count)
    ]
    expected = [
        (row, token, seq_lens[row] - starts[row + 1] + token)
        for row in range(decodes, 7)
        for token in range(starts[row], starts[row + 1])
    ]
    assert sorted(found) == expected
    assert tiles[:, 2].max() <= 6


def test_there_are_tiles_enough_for_the_worst_batch_of_a_shape():
    lens = [7, 1, 7, 13]  # each one more than whole tiles, and no padding token
    starts = np.cumsum([0, *lens])
    batch = PagedBatch(
        jnp.zeros((4, 1), jnp.int32),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lens, jnp.int32),
        jnp.int32(0),
    )
    tiles = np.asarray(list_tiles(batch, num_tokens=28, query_tokens=6))
    assert len(tiles) == 2 + 1 + 2 + 3
    assert tiles[:, 2].sum() == 28


list_tiles = jax.jit(ragged.list_tiles, static_argnames=("num_tokens", "query_tokens"))


def specs(
    *,
    heads: tuple[int, int, int] = (32, 8, 128),
    dtype: str = "bfloat16",
    block_size: int = 16,
    num_blocks: int = 512,
    num_tokens: int = 256,
) -> tuple[Any, ...]:
    """What `paged_prefill` takes, as shapes: 16 rows of up to 64 blocks."""
    N, K, H = heads
    array, B, M = jax.ShapeDtypeStruct, 16, 64
    integers: Any = [array(shape, jnp.int32) for shape in ((B, M), (B + 1,), (B,), ())]
    return (
        array((num_tokens, N, H), dtype),
        array((num_blocks, K, block_size, 2 * H), dtype),
        PagedBatch(*integers),
        array((B, N, H), dtype),
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dtype": "float8_e5m2"}, r"got float8_e5m2; or use `xla`"),
        ({"num_tokens": 2**19}, "q must have at most .* elements, got 2147483648"),
    ],
    ids=str,
)
def test_what_it_cannot_take_is_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(ragged.paged_prefill, scale=SCALE), *specs(**sizes))


def test_a_tile_out_of_range_is_refused():
    with pytest.raises(ValueError, match="query_rows must be a power of two of at least 16"):
        RaggedConfig(query_rows=96)
    with pytest.raises(ValueError, match="num_stages must be"):
        RaggedConfig(num_stages=0)
    too_many = functools.partial(ragged.paged_prefill, scale=SCALE, config=TINY)
    with pytest.raises(ValueError, match="query_rows=16 has no room for 17 queries"):
        jax.eval_shape(too_many, *specs(heads=(17, 1, 64)))


def test_wrong_shapes_are_refused():
    case = make_case([(3, 9)])
    q, pool, decoded = map(jnp.asarray, (case.q[0], case.pool, case.q[:3]))
    with pytest.raises(jaxtyping.TypeCheckError):
        ragged.paged_prefill(q, pool, case.batch, decoded, scale=SCALE)


GROUPS = [(5, 5), (6, 2), (4, 1), (10, 2), (7, 1), (12, 1)]  # 1, 3, 4, 5, 7 and 12 a KV head
POINTS = [
    *itertools.product(
        GROUPS, [64, 80, 96, 128], [8, 16, 32], OPTIONS, ["float32", "bfloat16", "float16"]
    )
]


@pytest.mark.kernels
@pytest.mark.parametrize(  # any three values of different axes meet in every 11th of the 864
    ("group", "head_size", "block_size", "options", "dtype"), POINTS[::11], ids=str
)
def test_the_matrix_agrees_with_dense_attention(
    group: tuple[int, int], head_size: int, block_size: int, options: dict[str, Any], dtype: str
):
    case = make_case(
        [(1, 37), (7, 7), (19, 141), (70, 130)], heads=(*group, head_size), block_size=block_size
    )
    assert_agrees(rounded(case, dtype), dtype, **options)
