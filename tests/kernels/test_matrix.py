"""The long matrix: decode and prefill on every backend of this machine, against NumPy in float64.

Each takes a share, the larger the less it compiles for a point: `cpu`, whose C++ is compiled
already, every 7th point, in which any four values of different axes meet; `xla` every 31st, in
which any three do; the simulated TPU kernels 45 of what they can do and the interpreted GPU
kernels 40 of theirs, in which any two do.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, paged_attention, paged_decode
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import (
    BACKENDS,
    SCALE,
    Case,
    dense,
    make_case,
    one_token_a_row,
    quantized,
    rounded,
)

# Queries and context; two contexts are longer than a tile of `cpu` and of `xla`'s decode.
ROWS = [(1, 1), (1, 37), (1, 150), (7, 7), (19, 141)]


class Point(NamedTuple):
    """A point of the matrix."""

    heads: tuple[int, int]  # of queries, of keys and values
    head_size: int
    block_size: int
    window: int | None
    soft_cap: float | None
    dtype: str  # of the query, and of a pool that is not quantised
    sinks: float | None  # the first head's; every further head's is one more
    quantized: str | None


HEADS = [(5, 5), (6, 2), (12, 3), (8, 1)]  # 1, 3, 4 and 8 queries a key
HEAD_SIZES = [24, 64, 80, 128]
BLOCK_SIZES = [8, 16, 32]
WINDOWS = [None, 1, 11, 40]
SOFT_CAPS = [None, 2.0]
DTYPES = ["float32", "bfloat16", "float16"]
SINKS = [None, -1.5]
QUANTIZED = [None, "int8", "float8_e4m3fn"]
AXES = (HEADS, HEAD_SIZES, BLOCK_SIZES, WINDOWS, SOFT_CAPS, DTYPES, SINKS, QUANTIZED)
POINTS = [Point(*values) for values in itertools.product(*AXES)]
SHARES = {
    Backend.CPU: POINTS[::7],
    Backend.XLA: POINTS[::31],
    Backend.PALLAS_TPU_INTERPRET: [
        point for point in POINTS if point.quantized or point.dtype != "float16"
    ][::137],
    Backend.PALLAS_GPU_INTERPRET: POINTS[::137],
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
    sinks = kv_scales = None
    if point.sinks is not None:
        sinks = point.sinks + np.arange(heads[0], dtype=np.float32)
    if point.quantized is not None:
        case, kv_scales = quantized(case, point.quantized)
    tolerance = TOLERANCES[point.dtype].attention
    prefilled, decoded = _attend(case, backend, point, {"sinks": sinks, "kv_scales": kv_scales})
    num_tokens = case.batch.query_starts[-1]
    options: Any = {"window": point.window, "soft_cap": point.soft_cap, "sinks": sinks}
    assert_close(prefilled[:num_tokens], dense(case, **options)[:num_tokens], tolerance, "prefill")
    assert_close(decoded, dense(one_token_a_row(case), **options), tolerance, "decode")


def _attend(
    case: Case, backend: Backend, point: Point, arrays: dict[str, np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """The whole ragged batch, and one token of each of its rows, by one program."""
    B = len(case.batch.seq_lens)
    options: Any = {"scale": SCALE, "window": point.window, "soft_cap": point.soft_cap}

    def both(q, pool, batch, arrays):
        keywords = options | arrays | {"backend": backend}
        decoded = paged_decode(q[:B], pool, batch.block_tables, batch.seq_lens, **keywords)
        return paged_attention(q, pool, batch, **keywords), decoded

    pool_dtype = point.quantized or point.dtype
    if (backend, pool_dtype) == (Backend.CPU, "float16"):
        pool_dtype = "float32"  # `cpu` takes a float16 query, over a pool of float32
    q, pool = jnp.asarray(case.q, point.dtype), jnp.asarray(case.pool, pool_dtype)
    prefilled, decoded = jax.jit(both)(q, pool, case.batch, arrays)
    assert prefilled.dtype == decoded.dtype == jnp.dtype(point.dtype)
    return np.asarray(prefilled), np.asarray(decoded)
