"""The GPU decode kernel in interpret mode, against NumPy in float64; every slot not seen is NaN."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels import Backend
from pallas_kernels.gpu.decode import paged_decode
from pallas_kernels.gpu.tiles import DecodeConfig, decode_config
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import SCALE, Case, dense, make_case, rounded, run

SMALL = DecodeConfig(tile_tokens=16, split_tokens=48)
# A block of 8, a tile of 16 and a split of 48, each less one, exactly and one more.
BORDERS = [1, 7, 8, 9, 15, 16, 17, 47, 48, 49, 95, 96, 97, 145]


def decode_case(lens: list[int], **options: Any) -> Case:
    return make_case([(1, length) for length in lens], **options)


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def attend(q: Any, pool: Any, tables: Any, lens: Any, **options: Any) -> jax.Array:
    return paged_decode(q, pool, tables, lens, interpret=True, **options)


def decode(case: Case, dtype: str = "float32", config: DecodeConfig | None = SMALL, **options: Any):
    B = len(case.batch.seq_lens)
    q, pool = jnp.asarray(case.q[:B], dtype), jnp.asarray(case.pool, dtype)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    out = attend(q, pool, tables, lens, scale=SCALE, config=config, **options)
    assert out.dtype == dtype
    return np.asarray(out)


def check(
    case: Case, dtype: str = "float32", config: DecodeConfig | None = SMALL, **options: Any
) -> None:
    case = rounded(case, dtype)
    expected = dense(case, **options)[: len(case.batch.seq_lens)]  # padding rows give zeros
    found = decode(case, dtype, config, **options)
    assert_close(found, expected, TOLERANCES[dtype].attention)
    np.testing.assert_array_equal(found[len(case.contexts) :], 0)


def test_lengths_around_blocks_tiles_and_splits_agree_with_numpy():
    check(decode_case(BORDERS))


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((9, 3, 64), "bfloat16"),
        ((8, 2, 128), "float16"),
        ((2, 2, 80), "float32"),
        ((7, 1, 96), "bfloat16"),
        ((4, 1, 256), "bfloat16"),
    ],
    ids=str,
)
def test_heads_and_dtypes_agree_with_numpy(heads: tuple[int, int, int], dtype: str):
    check(decode_case([50, 5, 97], heads=heads, block_size=16), dtype)


@pytest.mark.parametrize("block_size", [8, 128])
def test_block_sizes_agree_with_numpy_under_the_default_cut(block_size: int):
    config = decode_config(16, jnp.float32)
    lens = [config.split_tokens + 3, config.tile_tokens + 1, 131]
    check(decode_case(lens, block_size=block_size), config=None)


def test_blocks_longer_than_a_tile_or_no_power_of_two_agree_with_numpy():
    check(decode_case([131, 2, 64], block_size=128))
    check(decode_case([131, 2, 60], block_size=20), window=70)


@pytest.mark.parametrize("window", [1, 50])
def test_a_window_sees_its_last_tokens_and_reads_no_other(window: int):
    case = decode_case(BORDERS)
    pool = case.pool.copy()
    for row, kv in enumerate(case.contexts):
        for token in range(len(kv) - window):
            pool[case.batch.block_tables[row, token // 8], :, token % 8] = np.nan
    check(dataclasses.replace(case, pool=pool), window=window)


def test_a_soft_cap_bends_the_logits():
    case = decode_case([29, 6, 77])
    check(case, soft_cap=0.7)
    assert np.abs(dense(case) - dense(case, soft_cap=0.7)).max() > 0.01


@pytest.mark.parametrize("lens", [BORDERS, [30, 7, 25]], ids=["many splits", "one split"])
def test_sinks_join_the_splits(lens: list[int]):
    case = decode_case(lens)
    sinks = np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32)
    check(case, sinks=sinks)
    check(case, window=50, soft_cap=0.7, sinks=sinks)
    assert np.abs(dense(case) - dense(case, sinks=sinks)).max() > 0.1
    found = decode(case, sinks=np.full(6, -np.inf, np.float32))
    assert_close(found, decode(case), TOLERANCES["float32"].attention)


def test_more_splits_than_are_merged_at_once_agree_with_numpy():
    config = DecodeConfig(tile_tokens=16, split_tokens=16)
    check(decode_case([300, 257, 16], heads=(2, 1, 8)), config=config)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.kernels)])
def test_a_rows_bits_do_not_depend_on_what_is_around_it(dtype: str):
    case = decode_case([97, 5, 145, 50])
    expected = decode(case, dtype)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    q, P = case.q, len(case.pool)

    def change(pool: np.ndarray = case.pool, **batch: Any) -> Case:
        batch = {"block_tables": tables, "seq_lens": lens, **batch}
        return dataclasses.replace(
            case, q=q, pool=pool, batch=dataclasses.replace(case.batch, **batch)
        )

    moved = np.concatenate([case.pool[:1], case.pool[:0:-1], case.pool[:1]])
    same = {
        "other neighbours": change(seq_lens=lens.at[1].set(0).at[3].set(1)),
        "wider tables": change(block_tables=jnp.pad(tables, [(0, 0), (0, 70)])),
        "other blocks": change(moved, block_tables=jnp.where(tables == 0, 0, P - tables)),
    }
    for name, other in same.items():
        found = decode(other, dtype)
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]], name)
    one = dataclasses.replace(SMALL, num_programs=1, num_warps=2, num_stages=1)
    np.testing.assert_array_equal(decode(case, dtype, one), expected, "other programs")
    q = q[2:3]
    alone = change(block_tables=tables[2:3], seq_lens=lens[2:3])
    np.testing.assert_array_equal(decode(alone, dtype), expected[2:3], "alone")


def test_one_split_gives_the_bits_of_many():
    case = decode_case([48, 7, 33])
    narrow = dataclasses.replace(
        case, batch=dataclasses.replace(case.batch, block_tables=case.batch.block_tables[:, :6])
    )
    np.testing.assert_array_equal(decode(narrow), decode(case))


def test_the_query_may_have_another_dtype_than_the_pool():
    case = rounded(decode_case([33, 50]), "bfloat16")
    q, pool = jnp.asarray(case.q[:4], jnp.float32), jnp.asarray(case.pool, jnp.bfloat16)
    out = attend(q, pool, case.batch.block_tables, case.batch.seq_lens, scale=SCALE)
    assert out.dtype == jnp.float32
    assert_close(out, dense(case)[:4], TOLERANCES["bfloat16"].attention)


def test_dispatch_gives_it_the_rows_of_one_token():
    case = make_case([(1, 61), (1, 3), (5, 19), (9, 9)])
    options: Any = {"window": 30, "sinks": np.linspace(-3, 5, 6, dtype=np.float32)}
    out = run(case, Backend.PALLAS_GPU_INTERPRET, **options)
    expected = dense(case, **options)[: len(out)]
    assert_close(out, expected, TOLERANCES["float32"].attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_tokens": 8}, "power of two from 16 on, got 8"),
        ({"tile_tokens": 48}, "power of two from 16 on, got 48"),
        ({"split_tokens": 24}, "multiple of tile_tokens=16, got 24"),
        ({"split_tokens": 0}, "multiple of tile_tokens=16, got 0"),
        ({"num_warps": 3}, "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        ({"num_stages": 0}, "must be at least 1, got 0"),
        ({"num_programs": 0}, "must be at least 1, got 3 and 0"),
    ],
    ids=str,
)
def test_a_cut_that_cannot_be_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(("name", "dtype"), [("q", "float8_e4m3fn"), ("pool", "float8_e5m2")])
def test_dtypes_that_the_kernel_does_not_take_are_refused(name: str, dtype: str):
    case = decode_case([9])
    arrays = {"q": jnp.asarray(case.q[:3]), "pool": jnp.asarray(case.pool)}
    arrays[name] = arrays[name].astype(dtype)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    with pytest.raises(ValueError, match=rf"got {dtype}; or use `xla`"):
        paged_decode(arrays["q"], arrays["pool"], tables, lens, scale=SCALE, interpret=True)


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = decode_case([9, 4])
    q, pool = jnp.asarray(case.q[:4]), jnp.asarray(case.pool)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    with pytest.raises(TypeCheckError):
        paged_decode(q, pool, tables, lens[:-1], scale=SCALE, interpret=True)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"window": 33, "soft_cap": 2.0}], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
@pytest.mark.parametrize(
    "heads",
    [(9, 3, 64), (14, 2, 64), (2, 2, 80), (12, 3, 96), (16, 1, 128), (4, 1, 256)],
    ids=str,
)
def test_the_matrix_agrees_with_numpy(
    heads: tuple[int, int, int], block_size: int, options: dict[str, Any], dtype: str
):
    case = decode_case([1, 64, 129, 200], heads=heads, block_size=block_size)
    check(case, dtype, DecodeConfig(tile_tokens=32, split_tokens=64), **options)
