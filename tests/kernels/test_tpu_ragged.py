"""The TPU prefill kernel in TPU interpret mode, against NumPy in float64.

The simulator fills memory with NaN, and so does every test the slots that no row may see.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import TypeCheckError

from pallas_kernels.tpu import ragged
from pallas_kernels.tpu.ring import Ring
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import (
    SCALE,
    Case,
    dense,
    make_case,
    only_needed,
    padded,
    quantized,
    rounded,
)
from tests.kernels.simulator import Outcome, simulate

TILE = ragged.RaggedTile(tokens=16, blocks=2)
ROWS = [(1, 9), (7, 7), (19, 41), (1, 1), (16, 16), (2, 33)]
SINKS = np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32)

compiled_once = jax.jit(
    ragged.paged_prefill, static_argnames=("scale", "window", "soft_cap", "tile", "interpret")
)


def case_of(rows: list[tuple[int, int]], **options: Any) -> Case:
    """Rows in arrays of one size, whose T is no multiple of the query tile."""
    case = make_case(rows, num_padding=8 - len(rows), **options)
    return padded(case, tokens=75, columns=14, blocks=40)


def run(
    case: Case,
    dtype: str = "float32",
    *,
    tile: ragged.RaggedTile | None = TILE,
    options: dict[str, Any] | None = None,
    prefill: Any = compiled_once,
    **params: Any,
) -> Outcome:
    """The kernel's answers; those of decode rows are a number that no attention gives.

    What changes the module must pass `ragged.paged_prefill`.
    """
    B, (_, N, H) = case.batch.seq_lens.shape[0], case.q.shape
    decoded = jnp.full((B, N, H), 77.0, dtype)
    pool_dtype = dtype if case.pool.dtype == np.float32 else case.pool.dtype
    q, pool = jnp.asarray(case.q, dtype), jnp.asarray(case.pool, pool_dtype)

    def kernel(mode: pltpu.InterpretParams) -> jax.Array:
        return prefill(
            q, pool, case.batch, decoded, scale=SCALE, tile=tile, interpret=mode, **options or {}
        )

    outcome = simulate(kernel, **params)
    return outcome._replace(out=outcome.out.astype(np.float64))


def check(case: Case, outcome: Outcome, dtype: str = "float32", **options: Any) -> None:
    num_decodes, end = int(case.batch.num_decodes), int(case.batch.query_starts[-1])
    assert (outcome.out[:num_decodes] == 77).all()
    assert not outcome.out[end:].any()
    if num_decodes < end:
        expected = dense(case, **options)[num_decodes:end]
        assert_close(outcome.out[num_decodes:end], expected, TOLERANCES[dtype].attention)
    assert not outcome.raced


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [(8, 8), (16, 16), (24, 32)],
        [(9, 9), (17, 17), (25, 33)],
        [(1, 12), (0, 0), (5, 12), (0, 0), (3, 3), (0, 0)],
        [(41, 60)],
        [(2, 2), (3, 30), (5, 9), (4, 4)],
        [(1, 2), (1, 3), (1, 4), (20, 37)],
        [(72, 96)],
    ],
    ids=[
        "prompts-and-chunks-among-decodes",
        "multiples-of-a-block",
        "one-over",
        "rows-without-tokens",
        "longer-than-a-tile",
        "several-rows-in-a-tile",
        "starts-within-a-tile",
        "everything-full",
    ],
)
def test_rows_of_every_length_and_place_agree_with_numpy(rows: list[tuple[int, int]]):
    case = only_needed(case_of(rows))
    check(case, run(case))


def test_chunks_of_one_token_agree_with_numpy():
    case = case_of([(1, 1), (1, 16), (1, 17), (5, 21)])
    batch = dataclasses.replace(case.batch, num_decodes=jnp.int32(0))
    check(dataclasses.replace(case, batch=batch), run(dataclasses.replace(case, batch=batch)))


def test_a_single_row_without_padding_agrees_with_numpy():
    case = make_case([(11, 30)], num_padding=0)
    check(case, run(case))


@pytest.mark.parametrize("num_padding", [0, 3])
def test_a_batch_of_decodes_fetches_nothing(num_padding: int):
    case = case_of([(1, 9 + row) for row in range(8 - num_padding)])
    batch = dataclasses.replace(case.batch, block_tables=case.batch.block_tables + 1000)
    case = dataclasses.replace(case, batch=batch)
    check(case, run(case))


@settings(max_examples=12)
@given(
    rows=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 30)), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_random_ragged_batches_agree_with_numpy(rows: list[tuple[int, int]], seed: int):
    case = only_needed(case_of([(n, n and n + before) for n, before in rows], seed=seed))
    check(case, run(case))


@pytest.mark.parametrize("window", [1, 11, 40])
def test_a_window_sees_and_fetches_its_last_tokens_only(window: int):
    case = only_needed(case_of([(1, 30), (7, 50), (2, 2), (33, 60), (5, 91)]), window)
    check(case, run(case, options={"window": window}), window=window)


def test_a_soft_cap_bends_the_logits():
    case = case_of(ROWS)
    check(case, run(case, options={"soft_cap": 0.7}), soft_cap=0.7)
    assert np.abs(dense(case, soft_cap=0.7) - dense(case)).max() > 0.01


def test_sinks_take_weight_at_any_height():
    case = case_of(ROWS)
    for sinks in (SINKS, np.array([-np.inf, -3e38, -1e30, -1e4, 1e4, 3e38], np.float32)):
        check(case, run(case, options={"sinks": sinks}), sinks=sinks)


@pytest.mark.parametrize(
    ("pool_dtype", "dtype"), [("int8", "float32"), ("float8_e4m3fn", "bfloat16")]
)
def test_quantized_pools_agree_with_numpy(pool_dtype: str, dtype: str):
    case, kv_scales = quantized(rounded(case_of(ROWS), dtype), pool_dtype)
    options = {"window": 19, "soft_cap": 3.0, "sinks": SINKS}
    outcome = run(case, dtype, options={"kv_scales": kv_scales, **options})
    check(case, outcome, dtype, **options)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((9, 3, 64), "bfloat16"),
        ((14, 2, 64), "float32"),
        ((4, 1, 256), "bfloat16"),
        ((8, 8, 128), "float32"),
        ((12, 12, 64), "bfloat16"),
        ((32, 8, 128), "bfloat16"),
    ],
    ids=str,
)
def test_head_counts_and_sizes_agree_with_numpy(heads: tuple[int, int, int], dtype: str):
    case = rounded(make_case([(1, 9), (13, 21), (5, 5)], heads=heads, num_padding=0), dtype)
    check(case, run(case, dtype), dtype)


def test_heads_in_turns_agree_with_numpy(monkeypatch: pytest.MonkeyPatch):
    # Of four KV heads, with 2 x 16 queries and 16 keys each, three would fit: two divide four.
    monkeypatch.setattr(ragged, "MAX_LOGITS", 3 * 2 * 16 * 16)
    case, kv_scales = quantized(make_case([(1, 9), (13, 41), (5, 5)], heads=(8, 4, 16)), "int8")
    options = {"kv_scales": jnp.asarray(kv_scales)}
    check(case, run(case, options=options, prefill=ragged.paged_prefill))


def test_heads_at_once_divide_the_heads_and_are_as_many_as_fit():
    for num_heads, fitting in itertools.product(range(1, 17), range(1, 20)):
        found = ragged.heads_at_once(num_heads, ragged.MAX_LOGITS // fitting)
        assert found == max(n for n in range(1, fitting + 1) if num_heads % n == 0)
    assert ragged.heads_at_once(6, 2 * ragged.MAX_LOGITS) == 1


@pytest.mark.parametrize("heads", [(8, 4, 16), (3, 3, 16)], ids=["shared", "of-one-core"])
def test_heads_on_two_cores_agree_with_numpy(heads: tuple[int, int, int]):
    rows, window = [(1, 30), (7, 50), (2, 2), (20, 33)], 21
    case, kv_scales = quantized(only_needed(make_case(rows, heads=heads), window), "int8")
    sinks = np.linspace(-2, 3, heads[0], dtype=np.float32)
    options: dict[str, Any] = {"window": window, "sinks": sinks}
    outcome = run(case, options={"kv_scales": kv_scales, **options}, num_cores_or_threads=2)
    check(case, outcome, **options)


@pytest.mark.parametrize("block_size", [16, 128])
def test_the_default_tile_agrees_with_numpy(block_size: int):
    case = make_case([(1, 29), (37, 290), (3, 130)], block_size=block_size)
    check(case, run(case, tile=None))


@pytest.mark.parametrize(
    "tile",
    [
        ragged.RaggedTile(tokens=48, blocks=3, ring=2),
        ragged.RaggedTile(tokens=16, blocks=1, ring=4),
        ragged.RaggedTile(tokens=32, blocks=20),
    ],
    ids=["ring-of-2", "ring-of-4", "longer-than-a-table"],
)
def test_tiles_and_rings_of_any_size_agree_with_numpy(tile: ragged.RaggedTile):
    case = only_needed(case_of([(1, 30), (7, 50), (0, 0), (33, 60), (5, 91)]))
    check(case, run(case, tile=tile))


def test_blocks_that_arrive_at_once_agree_too():
    case = case_of(ROWS)
    check(case, run(case, dma_execution_mode="eager"))


@pytest.mark.parametrize("cores", [1, 2])
def test_one_buffer_for_all_tiles_is_found_to_race(monkeypatch: pytest.MonkeyPatch, cores: int):
    slots = Ring._slots
    monkeypatch.setattr(Ring, "_slots", lambda ring, _, *blocks: slots(ring, 0, *blocks))
    case = make_case([(7, 50)], heads=(2, 2, 16))
    assert run(case, prefill=ragged.paged_prefill, num_cores_or_threads=cores).raced


def test_blocks_used_before_they_arrived_give_nan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ring, "_wait", lambda *_: None)
    assert np.isnan(run(case_of([(7, 50)]), prefill=ragged.paged_prefill).out).any()


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = case_of(ROWS)
    with pytest.raises(TypeCheckError):
        run(case, options={"sinks": SINKS[:5]}, prefill=ragged.paged_prefill)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": 24, "blocks": 2}, "multiple of 16 tokens, got 24"),
        ({"tokens": 16, "blocks": 0}, "at least 1 block, got 0"),
        ({"tokens": 16, "blocks": 2, "ring": 1}, "at least 2 tiles, got 1"),
    ],
)
def test_a_tile_that_cannot_work_is_refused(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        ragged.RaggedTile(**sizes)
