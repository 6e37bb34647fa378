"""The TPU decode kernel in TPU interpret mode, against NumPy in float64.

The simulator fills memory with NaN, and so does every test the slots that no row may see.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import TypeCheckError

from pallas_kernels.tpu import decode
from pallas_kernels.tpu.ring import Ring
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.simulator import Outcome, simulate


class Case(NamedTuple):
    """A kernel's arguments, and the result that NumPy finds."""

    q: jax.Array
    pool: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    options: dict[str, Any]
    expected: np.ndarray


def make_case(
    lens: list[int],
    *,
    heads: tuple[int, int, int] = (6, 2, 16),
    block_size: int = 8,
    dtype: str = "float32",
    scale: float = 0.3,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Case:
    rng = np.random.default_rng(0)
    N, K, H = heads
    S = block_size
    num_columns = -(-max(lens) // S) + 1
    num_blocks = 3 + sum(-(-length // S) for length in lens)
    ids = iter(rng.permutation(np.arange(1, num_blocks)))
    q = np.asarray(jnp.asarray(rng.standard_normal((len(lens), N, H)), dtype), np.float64)
    pool = np.full((num_blocks, K, S, 2 * H), np.nan)
    tables = np.zeros((len(lens), num_columns), np.int32)
    expected = np.zeros((len(lens), N, H))
    for row, length in enumerate(lens):
        kv = np.asarray(jnp.asarray(rng.standard_normal((length, K, 2 * H)), dtype), np.float64)
        for token in range(length):
            column, offset = divmod(token, S)
            if offset == 0:
                tables[row, column] = next(ids)
            pool[tables[row, column], :, offset] = kv[token]
        if window is not None:  # what has left the window must not be read either
            for token in range(length - window):
                pool[tables[row, token // S], :, token % S] = np.nan
            kv = kv[-window:]
        for head in range(N if length else 0):
            k, v = np.split(kv[:, head // (N // K)], 2, axis=-1)
            logits = k @ q[row, head] * scale
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            weights = np.exp(logits - logits.max())
            expected[row, head] = weights @ v / weights.sum()
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    arrays = jnp.asarray(q, dtype), jnp.asarray(pool, dtype), jnp.asarray(tables)
    return Case(*arrays, jnp.asarray(lens, jnp.int32), options, expected)


def run(case: Case, *, tile_blocks: int | None = 2, ring: int = 3, **params: Any) -> Outcome:
    tile = decode.DecodeTile(blocks=tile_blocks, ring=ring) if tile_blocks else None
    arrays = case.q, case.pool, case.block_tables, case.seq_lens

    def kernel(mode: pltpu.InterpretParams) -> jax.Array:
        return decode.paged_decode(*arrays, tile=tile, interpret=mode, **case.options)

    outcome = simulate(kernel, **params)
    return outcome._replace(out=outcome.out.astype(np.float64))


def check(case: Case, outcome: Outcome) -> None:
    assert_close(outcome.out, case.expected, TOLERANCES[case.q.dtype.name].attention)
    assert not outcome.raced


def test_lengths_around_a_block_and_a_tile_agree_with_numpy():
    case = make_case([1, 7, 8, 9, 16, 17, 32, 33, 50])
    check(case, run(case))


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((9, 3, 64), "float32"),
        ((9, 3, 64), "bfloat16"),
        ((14, 2, 64), "bfloat16"),
        ((32, 8, 128), "bfloat16"),
        ((4, 1, 256), "float32"),
        ((8, 8, 128), "bfloat16"),
    ],
)
def test_head_counts_and_sizes_agree_with_numpy(heads: tuple[int, int, int], dtype: str):
    case = make_case([21, 5], heads=heads, dtype=dtype, scale=heads[2] ** -0.5)
    check(case, run(case))


def test_blocks_longer_than_logits_registers_agree_with_numpy():
    case = make_case([131, 2], block_size=128)
    check(case, run(case, tile_blocks=1))


def test_the_default_tile_agrees_with_numpy():
    case = make_case([37, 3, 150], block_size=16)
    check(case, run(case, tile_blocks=None))


@pytest.mark.parametrize("tile_blocks", [3, 11])
def test_a_tile_need_not_divide_a_table_and_may_be_longer(tile_blocks: int):
    case = make_case([3, 33, 8])
    check(case, run(case, tile_blocks=tile_blocks))


def test_rows_of_length_zero_give_zeros():
    case = make_case([0, 19, 0])
    outcome = run(case)
    check(case, outcome)
    assert not outcome.out[[0, 2]].any()
    assert outcome.out[1].any()


@pytest.mark.parametrize("window", [1, 11, 40])
def test_a_window_sees_its_last_tokens_only(window: int):
    case = make_case([50, 8, 12, 0, 33], window=window)
    check(case, run(case))


def test_only_blocks_that_hold_a_visible_token_are_fetched():
    case = make_case([50, 8, 12, 0, 33], window=19)
    lens_B1 = np.asarray(case.seq_lens)[:, None]
    firsts_BM = np.arange(case.block_tables.shape[1])[None, :] * 8
    needed_BM = (firsts_BM < lens_B1) & (firsts_BM + 8 > lens_B1 - 19)
    nowhere = case.pool.shape[0] + 5  # the simulator raises where a copy leaves the pool
    case = case._replace(block_tables=jnp.where(needed_BM, case.block_tables, nowhere))
    check(case, run(case))


def test_a_soft_cap_bends_the_logits():
    case = make_case([29, 6], soft_cap=0.7)
    straight = make_case([29, 6])
    check(case, run(case))
    assert np.abs(case.expected - straight.expected).max() > 0.01


def test_blocks_that_arrive_at_once_agree_too():
    case = make_case([40, 17], window=30)
    check(case, run(case, dma_execution_mode="eager"))


def test_one_buffer_for_all_tiles_is_found_to_race(monkeypatch: pytest.MonkeyPatch):
    slots = Ring._slots
    monkeypatch.setattr(Ring, "_slots", lambda ring, _, *blocks: slots(ring, 0, *blocks))
    assert run(make_case([50])).raced


def test_blocks_used_before_they_arrived_give_nan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ring, "_wait", lambda *_: None)
    assert np.isnan(run(make_case([50])).out).any()


def test_the_kernel_runs_inside_a_jitted_step_by_plain_interpret():
    case = make_case([20, 0, 9])
    step = jax.jit(functools.partial(decode.paged_decode, interpret=True, **case.options))
    out = step(case.q, case.pool, case.block_tables, case.seq_lens)
    check(case, Outcome(np.asarray(out, np.float64), raced=False))


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = make_case([9, 4])
    with pytest.raises(TypeCheckError):
        decode.paged_decode(case.q, case.pool, case.block_tables, case.seq_lens[:1], scale=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": jnp.zeros((4, 2, 12, 32))}, "multiple of 8, got 12"),
        ({"pool": jnp.zeros((4, 2, 8, 32), jnp.float16)}, "got float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change: dict[str, Any], message: str):
    case = make_case([9, 4])
    arguments = case._asdict() | case.options | change
    del arguments["options"], arguments["expected"]
    with pytest.raises(ValueError, match=message):
        decode.paged_decode(**arguments)
