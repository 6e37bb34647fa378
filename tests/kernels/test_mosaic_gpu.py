"""The Hopper kernels simulated with their threads, races looked for, against NumPy in float64.

Every slot that no query sees is NaN, and the tables name no block behind a context.
"""

import dataclasses
import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import Backend
from pallas_kernels.gpu.mosaic.limits import check_pool, missing_jax
from pallas_kernels.gpu.mosaic.work import list_splits
from pallas_kernels.gpu.splits import max_splits
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import SCALE, Case, dense, make_case, rounded, run

simulated = pytest.mark.skipif(
    missing_jax(interpreted=True) is not None, reason=missing_jax(interpreted=True) or ""
)
DTYPE = "bfloat16"
NO_BLOCK = 2**30
# A block of 16, a tile of 64 and a split of 128, each less one, exactly and one more.
BORDERS = [1, 16, 17, 63, 64, 65, 127, 128, 129, 200]


def wild(case: Case) -> Case:
    """The case with tables that name no block behind a context."""
    S = case.pool.shape[2]
    tables = np.asarray(case.batch.block_tables)
    behind = np.arange(tables.shape[1])[None, :] * S >= np.asarray(case.batch.seq_lens)[:, None]
    tables = jnp.asarray(np.where(behind, NO_BLOCK, tables))
    return dataclasses.replace(case, batch=dataclasses.replace(case.batch, block_tables=tables))


def decode_case(lens: list[int], heads: tuple[int, int, int] = (4, 2, 64), **options: Any) -> Case:
    case = make_case([(1, n) for n in lens], heads=heads, **{"block_size": 16, **options})
    return wild(rounded(case, DTYPE))


def decode(case: Case, dtype: str = DTYPE, cut: dict[str, Any] | None = None, **options: Any):
    from pallas_kernels.gpu.mosaic import decode

    small = {"tile_tokens": 64, "split_tokens": 128, "num_stages": 2, "num_programs": 3}
    config = decode.MosaicDecodeConfig(**{**small, **(cut or {})})
    B = len(case.batch.seq_lens)
    attend = functools.partial(
        decode.paged_decode, scale=SCALE, config=config, interpret=True, **options
    )
    q, pool = jnp.asarray(case.q[:B], dtype), jnp.asarray(case.pool, dtype)
    return np.asarray(jax.jit(attend)(q, pool, case.batch.block_tables, case.batch.seq_lens))


def check_decode(case: Case, dtype: str = DTYPE, cut: Any = None, **options: Any) -> None:
    found = decode(case, dtype, cut, **options)
    expected = dense(case, **options)[: len(found)]  # padding rows give zeros
    assert_close(found, expected, TOLERANCES[dtype].attention)
    np.testing.assert_array_equal(found[len(case.contexts) :], 0)


def prefill(case: Case, dtype: str = DTYPE, cut: dict[str, Any] | None = None, **options: Any):
    from pallas_kernels.gpu.mosaic import prefill

    config = prefill.MosaicPrefillConfig(**{"context_tokens": 64, "num_stages": 2, **(cut or {})})
    attend = functools.partial(
        prefill.paged_prefill, scale=SCALE, config=config, interpret=True, **options
    )
    B = len(case.batch.seq_lens)
    q, pool = jnp.asarray(case.q, dtype), jnp.asarray(case.pool, dtype)
    decoded = jnp.full((B, *q.shape[1:]), 7, dtype)
    return np.asarray(jax.jit(attend)(q, pool, case.batch, decoded))


def check_prefill(case: Case, dtype: str = DTYPE, cut: Any = None, **options: Any) -> None:
    found, T = prefill(case, dtype, cut, **options), case.batch.query_starts[-1]
    D = int(case.batch.num_decodes)
    np.testing.assert_array_equal(found[:D], 7)
    np.testing.assert_array_equal(found[T:], case.q[T:])  # padding gets its own query back
    assert_close(found[D:T], dense(case, **options)[D:T], TOLERANCES[dtype].attention)


@simulated
def test_decode_at_lengths_around_blocks_tiles_and_splits():
    check_decode(decode_case(BORDERS))


@simulated
@pytest.mark.parametrize(
    ("heads", "block_size", "cut"),
    [
        ((3, 1, 128), 8, {}),
        pytest.param((16, 1, 64), 32, {"tile_tokens": 128}, marks=pytest.mark.kernels),
        pytest.param((7, 1, 64), 128, {"num_programs": 1}, marks=pytest.mark.kernels),
        pytest.param((2, 2, 64), 64, {"num_stages": 1}, marks=pytest.mark.kernels),
    ],
    ids=str,
)
def test_decode_of_other_heads_blocks_and_cuts(
    heads: tuple[int, int, int], block_size: int, cut: dict[str, Any]
):
    check_decode(decode_case([130, 5], heads, block_size=block_size), cut=cut)


@simulated
def test_decode_with_a_window_a_cap_and_sinks():
    sinks = jnp.array([-60, 0.3, 8, 90], jnp.float32)
    case = decode_case([200, 70, 3])
    options: Any = {"window": 70, "soft_cap": 2.0, "sinks": sinks}
    assert np.abs(dense(case) - dense(case, **options)).max() > 0.1
    pool = case.pool.copy()
    for row, kv in enumerate(case.contexts):
        for token in range(len(kv) - options["window"]):
            pool[case.batch.block_tables[row, token // 16], :, token % 16] = np.nan
    check_decode(dataclasses.replace(case, pool=pool), **options)


@simulated
def test_a_rows_bits_depend_on_neither_the_batch_nor_the_programs():
    case = decode_case([130, 5, 200])
    expected = decode(case)
    lens = case.batch.seq_lens
    fewer = dataclasses.replace(
        case, batch=dataclasses.replace(case.batch, seq_lens=lens.at[0].set(0).at[1].set(1))
    )
    found = decode(fewer, cut={"num_programs": 7, "num_stages": 3})
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_array_equal(found[0], 0)


@simulated
@pytest.mark.parametrize(
    ("module", "name"), [("decode", "full"), ("prefill", "full"), ("prefill", "empty")]
)
def test_a_wait_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch, module: str, name: str):
    # The public modules have no way to end what a race has stopped.
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulation
    from jax.experimental.pallas import mosaic_gpu as plgpu

    waits, wait = [], plgpu.barrier_wait

    def wait_but_for_one(barrier: Any) -> None:
        mine = sys._getframe(1).f_locals.get(name)  # the kernel's barrier of that name
        if mine is not None and getattr(barrier, "ref", barrier) is mine:
            waits.append(name)
        else:
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_but_for_one)
    case = rounded(make_case([(70, 200)], heads=(4, 2, 64), block_size=16), DTYPE)
    try:
        with pytest.raises(Exception, match=r"RACE DETECTED|no threads observed"):
            decode(decode_case([200])) if module == "decode" else prefill(case)
    finally:
        simulation.reset_gpu_interpret_mode_state()  # else the next simulation waits for ever
    assert waits


@simulated
def test_prefill_of_ragged_rows():
    check_prefill(
        wild(
            rounded(
                make_case([(1, 40), (20, 20), (70, 150)], heads=(4, 2, 64), block_size=16), DTYPE
            )
        )
    )


@simulated
@pytest.mark.parametrize(
    ("heads", "block_size", "cut"),
    [
        ((7, 1, 64), 32, {"context_tokens": 128}),
        pytest.param((3, 1, 128), 128, {"num_stages": 3}, marks=pytest.mark.kernels),
        pytest.param((16, 1, 128), 8, {}, marks=pytest.mark.kernels),
    ],
    ids=str,
)
def test_prefill_of_other_heads_blocks_and_cuts(
    heads: tuple[int, int, int], block_size: int, cut: dict[str, Any]
):
    case = make_case([(1, 1), (33, 140)], heads=heads, block_size=block_size)
    check_prefill(wild(rounded(case, DTYPE)), cut=cut)


@simulated
def test_prefill_with_a_window_a_cap_and_sinks():
    sinks = jnp.array([-60, 0.3, 8, 90], jnp.float32)
    case = rounded(make_case([(40, 200), (5, 5)], heads=(4, 2, 64), block_size=16), DTYPE)
    check_prefill(wild(case), window=30, soft_cap=2.0, sinks=sinks)


@simulated
def test_both_are_a_backend():
    case = rounded(make_case([(1, 61), (5, 19)], heads=(4, 2, 64), block_size=16), DTYPE)
    q, pool = jnp.asarray(case.q, DTYPE), jnp.asarray(case.pool, DTYPE)
    out = run(dataclasses.replace(case, q=q, pool=pool), Backend.MOSAIC_GPU_INTERPRET)
    assert_close(out, dense(case)[: len(out)], TOLERANCES[DTYPE].attention)


@given(
    lens=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    split_tokens=st.sampled_from([1, 5, 12]),
    window=st.sampled_from([None, 1, 13]),
)
def test_the_list_has_every_visible_token_once(
    lens: list[int], split_tokens: int, window: int | None
):
    X = max_splits(40, split_tokens, window)
    make_list = jax.jit(list_splits, static_argnames=("split_tokens", "max_splits", "window"))
    options: Any = {"split_tokens": split_tokens, "max_splits": X, "window": window}
    items, count = make_list(jnp.asarray(lens, jnp.int32), **options)
    live = np.asarray(items)[: int(count[0])].tolist()
    seen = [(row, position) for row, _, start, end in live for position in range(start, end)]
    expected = [
        (row, position)
        for row, length in enumerate(lens)
        for position in range(0 if window is None else max(0, length - window), length)
    ]
    assert seen == expected
    assert all(start < end <= (start // split_tokens + 1) * split_tokens for *_, start, end in live)
    places = [(row, place) for row, place, *_ in live]
    assert len(set(places)) == len(places)
    assert all(0 <= place < X for _, place in places)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "pools of .* got float32; use pallas-gpu"),
        ({"dtype": "int8"}, "pools of .* got int8; use pallas-gpu"),
        ({"head_size": 80}, r"head sizes \(64, 128\), got 80; use pallas-gpu"),
        ({"block_size": 24}, "a multiple of 128 slots, got 24; use pallas-gpu"),
        ({"block_size": 4}, "a multiple of 128 slots, got 4; use pallas-gpu"),
    ],
    ids=str,
)
def test_pools_that_the_kernels_do_not_take_are_refused(change: dict[str, Any], message: str):
    fitting = {"block_size": 16, "dtype": DTYPE, "head_size": 64}
    check_pool(**fitting)
    with pytest.raises(ValueError, match=message):
        check_pool(**fitting | change)


@simulated
@pytest.mark.parametrize("module", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("tile", "block_size", "message"),
    [
        (192, 128, "whole blocks or a whole part of one, got 192 tokens a tile and blocks of 128"),
        (256, 384, "whole blocks or a whole part of one, got 256 tokens a tile and blocks of 384"),
        (512, 512, "at most 256 rows, got tiles of 512 tokens and blocks of 512"),
    ],
)
def test_a_tile_that_copies_of_blocks_do_not_fill_is_refused(
    module: str, tile: int, block_size: int, message: str
):
    case = make_case([(1, 5), (3, 3)], heads=(2, 1, 64), block_size=block_size)
    attend, cut = decode, {"tile_tokens": tile, "split_tokens": tile}
    if module == "prefill":
        attend, cut = prefill, {"context_tokens": tile}
    with pytest.raises(ValueError, match=message):
        attend(case, cut=cut)


@simulated
@pytest.mark.parametrize(
    ("module", "name", "change", "message"),
    [
        ("decode", "MosaicDecodeConfig", {"tile_tokens": 32}, "multiple of 64, got 32"),
        ("decode", "MosaicDecodeConfig", {"split_tokens": 96}, "tile_tokens=64, got 96"),
        ("decode", "MosaicDecodeConfig", {"num_stages": 0}, "at least 1, got 0 and None"),
        ("decode", "MosaicDecodeConfig", {"num_programs": 0}, "at least 1, got 4 and 0"),
        ("prefill", "MosaicPrefillConfig", {"context_tokens": 96}, "multiple of 64, got 96"),
        ("prefill", "MosaicPrefillConfig", {"num_stages": 1}, "at least 2, got 1"),
    ],
    ids=str,
)
def test_a_cut_that_cannot_be_is_refused(
    module: str, name: str, change: dict[str, int], message: str
):
    config_class = getattr(importlib.import_module(f"pallas_kernels.gpu.mosaic.{module}"), name)
    fields = {"tile_tokens": 64} if module == "decode" else {"context_tokens": 64, "num_stages": 2}
    config_class(**fields)
    with pytest.raises(ValueError, match=message):
        config_class(**fields | change)
