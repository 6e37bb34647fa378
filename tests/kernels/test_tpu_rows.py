"""What a row gets from the TPU kernels depends, bit by bit, on the row alone: TPU interpret mode.

Company means other rows, another place in the batch and other blocks of the pool, all at once.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedBatch
from pallas_kernels.tpu import decode, ragged
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import SCALE, Case, dense, make_case, one_token_a_row, padded
from tests.kernels.simulator import simulate

EMPTY = -1  # the last row of each case has no tokens
ROWS = 7
OPTIONS: dict[str, Any] = {
    "scale": SCALE,
    "window": 30,
    "sinks": np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32),
}

compiled_decode, compiled_prefill = (
    jax.jit(kernel, static_argnames=("scale", "window", "tile", "interpret"))
    for kernel in (decode.paged_decode, ragged.paged_prefill)
)


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (4, 2, EMPTY, 3, 3, 1, 0), (EMPTY, EMPTY, 2), (3, 0, 3, 1, 2, 4, 2)]
)
def test_a_decode_row_is_the_same_alone_and_in_company(order: tuple[int, ...]):
    found = decoded(order)
    for place, row in enumerate(order):
        np.testing.assert_array_equal(found[place], decoded((row,), num_rows=1)[0])
        assert found[place].any() == (row != EMPTY)


def decoded(order: tuple[int, ...], *, num_rows: int = ROWS) -> np.ndarray:
    """What rows of these lengths get in this order; the empty one is the last."""
    lens = [33, 16, 50, 1, 17, 0]
    case = one_token_a_row(make_case([(1, length) for length in lens], num_padding=0))
    case = chosen(case, order, seed=len(order), num_rows=num_rows)
    tables, lens, tile = case.batch.block_tables, case.batch.seq_lens, decode.DecodeTile(blocks=2)
    kernel = functools.partial(compiled_decode, case.q, case.pool, tables, lens, tile=tile)
    return simulate(lambda mode: kernel(interpret=mode, **OPTIONS)).out


@pytest.mark.parametrize(
    "orders",
    [
        [(1,), (2, 1), (1, 5, 3), (3, 3, 4, 4, 4, 1), (EMPTY, 2, 1, 4)],
        [(3, 1), (4, 5, 1, 2), (2, EMPTY, 3, 1, 3), (0, 0, 0, 0, 0, 1, 5)],
    ],
    ids=["at-a-tiles-start", "within-a-tile"],
)
def test_a_chunk_that_starts_as_far_into_its_tile_is_the_same_in_any_company(
    orders: list[tuple[int, ...]],
):
    chunks = [prefilled(order, row=1) for order in orders]
    for chunk in chunks[1:]:
        np.testing.assert_array_equal(chunk, chunks[0])


def test_a_chunk_is_the_same_wherever_in_its_tile_it_starts():
    alone = prefilled((1,), row=1)
    for before in [(0,), (0, 4), (3,), (0, 5, 3), (4, 3, EMPTY, 3), (5, 3, 3, 4)]:
        np.testing.assert_array_equal(prefilled((*before, 1), row=1), alone, str(before))


def prefilled(order: tuple[int, ...], *, row: int) -> np.ndarray:
    """What the row's tokens get in a batch of such rows; decode rows come first."""
    rows = [(1, 9), (21, 60), (16, 16), (5, 50), (2, 2), (3, 30)]
    case = chosen(make_case(rows, num_padding=1), order, seed=len(order), num_rows=ROWS)
    case = padded(case, tokens=75, columns=10, blocks=len(case.pool))
    answers_of_others = jnp.zeros((ROWS, *case.q.shape[1:]))
    arrays = case.q, case.pool, case.batch, answers_of_others
    kernel = functools.partial(
        compiled_prefill, *arrays, tile=ragged.RaggedTile(tokens=16, blocks=2)
    )
    out = simulate(lambda mode: kernel(interpret=mode, **OPTIONS)).out
    start, end = np.asarray(case.batch.query_starts)[[order.index(row), order.index(row) + 1]]
    exact = dense(case, window=OPTIONS["window"], sinks=OPTIONS["sinks"])[start:end]
    assert_close(out[start:end], exact, TOLERANCES["float32"].attention)
    return out[start:end]


def chosen(case: Case, order: Iterable[int], *, seed: int, num_rows: int) -> Case:
    """These rows of the case and then empty ones, over a pool whose blocks lie elsewhere."""
    starts = np.asarray(case.batch.query_starts)
    rows = np.array([*order, *[EMPTY] * num_rows])[:num_rows]
    places = np.random.default_rng(seed).permutation(np.arange(1, len(case.pool)))
    places = np.concatenate([[0], places])
    pool = np.empty_like(case.pool)
    pool[places] = case.pool
    queries = np.split(case.q[: starts[-1]], starts[1:-1])
    counts = np.diff(starts)[rows]
    batch = PagedBatch(
        jnp.asarray(places[np.asarray(case.batch.block_tables)[rows]], jnp.int32),
        jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        case.batch.seq_lens[rows],
        jnp.asarray(np.sum(counts == 1), jnp.int32),
    )
    contexts = [case.contexts[row] if row != EMPTY else case.contexts[0][:0] for row in rows]
    return Case(np.concatenate([queries[row] for row in rows]), pool, batch, contexts)
