"""The TPU decode kernel in TPU interpret mode, against NumPy in float64.

The simulator fills memory with NaN, and so does every test the slots that no row may see.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import TypeCheckError

from pallas_kernels.tpu import decode
from pallas_kernels.tpu.ring import Ring
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import (
    SCALE,
    Case,
    dense,
    make_case,
    one_token_a_row,
    only_needed,
    padded,
    quantized,
    rounded,
)
from tests.kernels.simulator import Outcome, simulate, strictly_simulated

ROWS = 9
LENS = [1, 7, 8, 9, 16, 17, 32, 33, 50]  # around a block and a tile
SINKS = np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32)

compiled_once = jax.jit(
    decode.paged_decode, static_argnames=("scale", "window", "soft_cap", "tile", "interpret")
)


def make_rows(lens: list[int], **options: Any) -> Case:
    return one_token_a_row(make_case([(1, length) for length in lens], num_padding=0, **options))


def case_of(lens: list[int], **options: Any) -> Case:
    """Rows in arrays of one size; those that are missing are empty."""
    case = make_rows([*lens, *[0] * (ROWS - len(lens))], **options)
    return padded(case, tokens=ROWS, columns=14, blocks=64)


def run(
    case: Case,
    dtype: str = "float32",
    *,
    tile_blocks: int | None = 2,
    ring: int = 3,
    options: dict[str, Any] | None = None,
    paged_decode: Any = compiled_once,
    **params: Any,
) -> Outcome:
    """The kernel's answers; what changes the module must pass `decode.paged_decode`."""
    tile = decode.DecodeTile(blocks=tile_blocks, ring=ring) if tile_blocks else None
    pool_dtype = dtype if case.pool.dtype == np.float32 else case.pool.dtype
    q, pool = jnp.asarray(case.q, dtype), jnp.asarray(case.pool, pool_dtype)
    tables, lens = case.batch.block_tables, case.batch.seq_lens

    def kernel(mode: pltpu.InterpretParams) -> jax.Array:
        return paged_decode(
            q, pool, tables, lens, scale=SCALE, tile=tile, interpret=mode, **options or {}
        )

    outcome = simulate(kernel, **params)
    return outcome._replace(out=outcome.out.astype(np.float64))


def check(case: Case, outcome: Outcome, dtype: str = "float32", **options: Any) -> None:
    expected = dense(case, **options)
    if expected.any():
        assert_close(outcome.out, expected, TOLERANCES[dtype].attention)
    assert not outcome.out[np.asarray(case.batch.seq_lens) == 0].any()
    assert not outcome.raced


@pytest.mark.parametrize("ring", [2, 3, 4])
@pytest.mark.parametrize(
    "lens",
    [
        LENS,
        [1, 90, 2, 80, 1, 1, 70, 3, 95],
        [0, 0, 19, 0, 33, 0, 0, 8, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 50],
        [90],
        [0],
    ],
    ids=[
        "around-a-tile",
        "very-different",
        "empty-between",
        "only-the-last",
        "only-the-first",
        "0",
    ],
)
def test_rows_agree_with_numpy_whatever_row_fetches_their_first_tiles(lens: list[int], ring: int):
    case = only_needed(case_of(lens))
    check(case, run(case, ring=ring))


@settings(max_examples=12)
@given(lens=st.lists(st.integers(0, 50), min_size=1, max_size=ROWS), seed=st.integers(0, 9))
def test_random_lengths_agree_with_numpy(lens: list[int], seed: int):
    case = only_needed(case_of(lens, seed=seed))
    check(case, run(case))


def test_a_single_row_agrees_with_numpy():
    case = make_rows([50])
    check(case, run(case))


def test_many_short_rows_agree_with_numpy():
    case = make_rows([row * 5 % 13 for row in range(64)], heads=(2, 1, 16))
    check(case, run(case))


@pytest.mark.parametrize("window", [None, 140])
def test_short_last_tiles_agree_with_numpy(window: int | None):
    lens = [1, 127, 128, 129, 512, 513, 640, 641]
    case = only_needed(make_rows(lens, heads=(2, 1, 16), block_size=32), window)
    check(case, run(case, tile_blocks=16, options={"window": window}), window=window)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((9, 3, 64), "float32"),
        ((9, 3, 64), "bfloat16"),
        ((14, 2, 64), "bfloat16"),
        ((32, 8, 128), "bfloat16"),
        ((4, 1, 256), "float32"),
        ((8, 8, 128), "bfloat16"),
        ((12, 12, 64), "float32"),
    ],
    ids=str,
)
def test_head_counts_and_sizes_agree_with_numpy(heads: tuple[int, int, int], dtype: str):
    case = rounded(make_rows([21, 5], heads=heads), dtype)
    check(case, run(case, dtype), dtype)


def test_heads_in_groups_agree_with_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MAX_LOGITS", 300)  # two heads with 8 queries and 16 keys each
    case = only_needed(make_rows([95, 3, 50], heads=(6, 3, 16)))
    check(case, run(case, paged_decode=decode.paged_decode))


@pytest.mark.parametrize(
    ("lens", "copies"),
    [
        ([50, 0, 33, 8, 0, 17, 90, 1, 9], "on_wait"),
        ([0, 9, 40, 0, 33], "eager"),  # the first core fetches nothing behind its last row
    ],
)
def test_an_odd_number_of_rows_on_two_cores_agrees_with_numpy(lens: list[int], copies: str):
    options: dict[str, Any] = {"window": 60, "sinks": SINKS}
    case, kv_scales = quantized(only_needed(make_rows(lens), window=60), "int8")
    params = {"num_cores_or_threads": 2, "dma_execution_mode": copies}
    outcome = run(case, options={"kv_scales": kv_scales, **options}, **params)
    check(case, outcome, **options)


def test_blocks_longer_than_logits_registers_agree_with_numpy():
    case = make_rows([131, 2], block_size=128)
    check(case, run(case, tile_blocks=1))


def test_the_default_tile_agrees_with_numpy():
    case = make_rows([37, 3, 150], block_size=16)
    check(case, run(case, tile_blocks=None))


@pytest.mark.parametrize("tile_blocks", [3, 20])
def test_a_tile_need_not_divide_a_table_and_may_be_longer(tile_blocks: int):
    case = only_needed(case_of([3, 33, 8]))
    check(case, run(case, tile_blocks=tile_blocks))


@pytest.mark.parametrize("window", [1, 11, 40])
def test_a_window_sees_and_fetches_its_last_tokens_only(window: int):
    case = only_needed(case_of([50, 8, 12, 0, 33, 90, 40, 41]), window)
    check(case, run(case, options={"window": window}), window=window)


def test_a_soft_cap_bends_the_logits():
    case = case_of([29, 6])
    check(case, run(case, options={"soft_cap": 0.7}), soft_cap=0.7)
    assert np.abs(dense(case, soft_cap=0.7) - dense(case)).max() > 0.01


def test_sinks_take_weight_at_any_height():
    case = case_of([*LENS[:-1], 0])
    for sinks in (SINKS, np.array([-np.inf, -3e38, -1e30, -1e4, 1e4, 3e38], np.float32)):
        check(case, run(case, options={"sinks": sinks}), sinks=sinks)


@pytest.mark.parametrize(
    ("pool_dtype", "dtype"),
    [("int8", "float32"), ("int8", "bfloat16"), ("float8_e4m3fn", "bfloat16")],
)
def test_quantized_pools_agree_with_numpy(pool_dtype: str, dtype: str):
    case, kv_scales = quantized(rounded(case_of(LENS), dtype), pool_dtype)
    options = {"window": 19, "soft_cap": 3.0, "sinks": SINKS}
    outcome = run(case, dtype, options={"kv_scales": kv_scales, **options})
    check(case, outcome, dtype, **options)


def test_every_number_of_float8_is_read_as_it_is():
    """A row of one token gives its value back: subnormals, the largest and both zeros."""
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    codes = np.where(np.isnan(codes.astype(np.float32)), 0, codes)
    pool = np.zeros((3, 1, 8, 512), jnp.float8_e4m3fn)
    pool[2, 0, 0, 256:] = codes
    tables, lens = jnp.array([[2]], jnp.int32), jnp.array([1], jnp.int32)
    options: Any = {"scale": SCALE, "kv_scales": jnp.ones((2, 1)), "interpret": True}
    out = compiled_once(jnp.ones((1, 1, 256)), jnp.asarray(pool), tables, lens, **options)
    np.testing.assert_array_equal(np.asarray(out)[0, 0], codes.astype(np.float32))


def test_blocks_that_arrive_at_once_agree_too():
    case = case_of([40, 0, 17])
    check(case, run(case, dma_execution_mode="eager"))


@pytest.mark.parametrize(
    ("lens", "cores"),
    [([50], 1), ([9, 9, 9], 1), ([9, 0, 9, 9], 2)],
    ids=["of-a-row", "of-all-rows", "of-the-second-cores-rows"],
)
def test_one_buffer_for_all_tiles_is_found_to_race(
    monkeypatch: pytest.MonkeyPatch, lens: list[int], cores: int
):
    slots = Ring._slots
    monkeypatch.setattr(Ring, "_slots", lambda ring, _, *blocks: slots(ring, 0, *blocks))
    case = make_rows(lens)
    assert run(case, paged_decode=decode.paged_decode, num_cores_or_threads=cores).raced


def test_a_race_of_any_kernel_fails_what_is_strictly_simulated(monkeypatch: pytest.MonkeyPatch):
    slots = Ring._slots
    monkeypatch.setattr(Ring, "_slots", lambda ring, _, *blocks: slots(ring, 0, *blocks))
    case = make_rows([50])
    arrays = jnp.asarray(case.q), jnp.asarray(case.pool), case.batch.block_tables
    options: dict[str, Any] = {"scale": SCALE, "tile": decode.DecodeTile(blocks=2)}
    attend = functools.partial(decode.paged_decode, *arrays, interpret=True, **options)

    def raced_and_then_not() -> None:
        with strictly_simulated():
            attend(case.batch.seq_lens)
            attend(jnp.array([1], jnp.int32))

    with pytest.raises(AssertionError, match="there was a race"):
        raced_and_then_not()


def test_blocks_used_before_they_arrived_give_nan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ring, "_wait", lambda *_: None)
    assert np.isnan(run(make_rows([50]), paged_decode=decode.paged_decode).out).any()


def test_the_kernel_runs_inside_a_jitted_step_by_plain_interpret():
    case = make_rows([20, 0, 9])
    step = jax.jit(functools.partial(decode.paged_decode, interpret=True, scale=SCALE))
    out = step(case.q, case.pool, case.batch.block_tables, case.batch.seq_lens)
    check(case, Outcome(np.asarray(out, np.float64), raced=False))


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = make_rows([9, 4])
    q, pool, batch = jnp.asarray(case.q), jnp.asarray(case.pool), case.batch
    with pytest.raises(TypeCheckError):
        decode.paged_decode(q, pool, batch.block_tables, batch.seq_lens[:1], scale=SCALE)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (jnp.zeros((4, 2, 12, 32)), "multiple of 8, got 12"),
        (jnp.zeros((4, 2, 8, 32), jnp.float16), "got float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(pool: jax.Array, message: str):
    q, tables, lens = jnp.zeros((2, 6, 16)), jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        decode.paged_decode(q, pool, tables, lens, scale=SCALE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"blocks": 0}, "at least 1 block, got 0"),
        ({"blocks": 2, "ring": 1}, "at least 2 tiles, got 1"),
    ],
)
def test_a_tile_that_cannot_work_is_refused(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        decode.DecodeTile(**sizes)
