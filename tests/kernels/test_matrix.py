"""The long matrix: decode and prefill on every backend of this machine, against NumPy in float64.

The C++ of `cpu` is compiled already and takes every point. The others compile a program a point, so
they take a share: `xla` every 7th, 165 points in which any three values of different axes still
meet, the simulated TPU kernel every 27th of what it can do, 29 points in which any two meet, and
the interpreted GPU kernel every 29th.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, paged_attention, paged_decode
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import BACKENDS, SCALE, Case, dense, make_case, one_token_a_row, rounded

# Queries and context; two contexts are longer than a tile of `cpu` and of `xla`'s decode.
ROWS = [(1, 1), (1, 37), (1, 150), (7, 7), (19, 141)]


class Point(NamedTuple):
    """A point of the matrix."""

    heads: tuple[int, int]  # of queries, of keys and values
    head_size: int
    block_size: int
    window: int | None
    soft_cap: float | None
    dtype: str


HEADS = [(5, 5), (6, 2), (12, 3), (8, 1)]  # 1, 3, 4 and 8 queries a key
HEAD_SIZES = [24, 64, 80, 128]
BLOCK_SIZES = [8, 16, 32]
WINDOWS = [None, 1, 11, 40]
SOFT_CAPS = [None, 2.0]
DTYPES = ["float32", "bfloat16", "float16"]
POINTS = [
    Point(*values)
    for values in itertools.product(HEADS, HEAD_SIZES, BLOCK_SIZES, WINDOWS, SOFT_CAPS, DTYPES)
]
SHARES = {
    Backend.CPU: POINTS,
    Backend.XLA: POINTS[::7],
    Backend.PALLAS_TPU_INTERPRET: [point for point in POINTS if point.dtype != "float16"][::27],
    Backend.PALLAS_GPU_INTERPRET: POINTS[::29],
}
CASES = [
    (backend, point)
    for backend, share in SHARES.items()
    if backend in {*BACKENDS, Backend.PALLAS_TPU_INTERPRET, Backend.PALLAS_GPU_INTERPRET}
    for point in share
]


@pytest.mark.kernels
@pytest.mark.parametrize(("backend", "point"), CASES, ids=str)
def test_decode_and_prefill_agree_with_dense_attention(backend: Backend, point: Point):
    heads = (*point.heads, point.head_size)
    case = rounded(make_case(ROWS, heads=heads, block_size=point.block_size), point.dtype)
    options = {"window": point.window, "soft_cap": point.soft_cap}
    tolerance = TOLERANCES[point.dtype].attention
    prefilled, decoded = _attend(case, backend, point.dtype, options)
    num_tokens = case.batch.query_starts[-1]
    assert_close(prefilled[:num_tokens], dense(case, **options)[:num_tokens], tolerance, "prefill")
    assert_close(decoded, dense(one_token_a_row(case), **options), tolerance, "decode")


def _attend(
    case: Case, backend: Backend, dtype: str, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The whole ragged batch, and one token of each of its rows, by one program."""
    B = len(case.batch.seq_lens)

    def both(q, pool, batch):
        keywords = {"scale": SCALE, "backend": backend, **options}
        decoded = paged_decode(q[:B], pool, batch.block_tables, batch.seq_lens, **keywords)
        return paged_attention(q, pool, batch, **keywords), decoded

    # `cpu` takes a float16 query, over a pool of float32.
    pool_dtype = "float32" if (backend, dtype) == (Backend.CPU, "float16") else dtype
    q, pool = jnp.asarray(case.q, dtype), jnp.asarray(case.pool, pool_dtype)
    prefilled, decoded = jax.jit(both)(q, pool, case.batch)
    assert prefilled.dtype == decoded.dtype == jnp.dtype(dtype)
    return np.asarray(prefilled), np.asarray(decoded)
