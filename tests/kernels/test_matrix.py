"""The long matrix: decode and prefill on every backend of this machine, against NumPy in float64.

Each takes a share, the larger the less it compiles for a point: of `cpu`, whose C++ is compiled
already, any four values of different axes meet; of `xla` any three do; of the simulated TPU kernels
and of the interpreted GPU kernels, of Triton and of Mosaic, any two do.
"""

import contextlib
import dataclasses
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Backend, paged_attention, paged_decode
from pallas_kernels.gpu.mosaic.limits import HEAD_SIZES as HEAD_SIZES_OF_MOSAIC
from pallas_kernels.gpu.mosaic.limits import missing_jax
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
from tests.kernels.simulator import strictly_simulated

# Queries and context; two contexts are longer than a tile of `cpu` and of `xla`'s decode.
ROWS = [(1, 1), (1, 37), (1, 150), (7, 7), (19, 141)]


class Point(NamedTuple):
    """A point of the matrix."""

    window: int | None
    heads: tuple[int, int]  # of queries, of keys and values
    soft_cap: float | None
    head_size: int
    block_size: int
    sinks: float | None  # the first head's; every further head's is one more
    dtype: str  # of the query, and of a pool that is not quantised
    quantized: str | None


HEADS = [(5, 5), (6, 2), (12, 3), (8, 1)]  # 1, 3, 4 and 8 queries a key
HEAD_SIZES = [24, 64, 80, 96, 128, 256]
BLOCK_SIZES = [8, 16, 32, 64, 128]
WINDOWS = [None, 1, 11, 40]
SOFT_CAPS = [None, 2.0]
DTYPES = ["float32", "bfloat16", "float16"]
SINKS = [None, -1.5]
QUANTIZED = [None, "int8", "float8_e4m3fn"]
# In an order, found by trial, in which few points at equal distances meet the most values.
AXES = (WINDOWS, HEADS, SOFT_CAPS, HEAD_SIZES, BLOCK_SIZES, SINKS, DTYPES, QUANTIZED)
POINTS = [Point(*values) for values in itertools.product(*AXES)]
TPU_POINTS = [point for point in POINTS if point.quantized or point.dtype != "float16"]
MOSAIC_POINTS = [
    point
    for point in POINTS
    if point.head_size in HEAD_SIZES_OF_MOSAIC
    and point.dtype != "float32"
    and point.quantized is None
]
SHARES = {
    Backend.CPU: POINTS[::17],
    Backend.XLA: POINTS[::71],
    Backend.PALLAS_TPU_INTERPRET: TPU_POINTS[::337],
    Backend.PALLAS_GPU_INTERPRET: POINTS[::326],
    Backend.MOSAIC_GPU_INTERPRET: MOSAIC_POINTS[::37],
}
SIMULATED = [Backend.PALLAS_TPU_INTERPRET, Backend.PALLAS_GPU_INTERPRET]
if missing_jax(interpreted=True) is None:
    SIMULATED.append(Backend.MOSAIC_GPU_INTERPRET)
CASES = [
    (backend, point)
    for backend, share in SHARES.items()
    if backend in {*BACKENDS, *SIMULATED}
    for point in share
]


@pytest.mark.parametrize(
    ("backend", "possible", "num_axes"),
    [
        (Backend.CPU, POINTS, 4),
        (Backend.XLA, POINTS, 3),
        (Backend.PALLAS_TPU_INTERPRET, TPU_POINTS, 2),
        (Backend.PALLAS_GPU_INTERPRET, POINTS, 2),
        (Backend.MOSAIC_GPU_INTERPRET, MOSAIC_POINTS, 2),
    ],
)
def test_values_of_different_axes_meet(backend: Backend, possible: list[Point], num_axes: int):
    for axes in itertools.combinations(range(len(AXES)), num_axes):
        values = operator.itemgetter(*axes)
        assert {values(point) for point in SHARES[backend]} == {values(point) for point in possible}


@pytest.mark.kernels
@pytest.mark.parametrize(("backend", "point"), CASES, ids=str)
def test_decode_and_prefill_agree_with_dense_attention(backend: Backend, point: Point):
    heads = (*point.heads, point.head_size)
    case = make_case(ROWS, heads=heads, block_size=point.block_size)
    # Logits grow with the head size, and with them what float32 rounds off.
    case = dataclasses.replace(case, q=case.q * np.float32(min(1, 128 / point.head_size)))
    case = rounded(case, point.dtype)
    sinks = kv_scales = None
    if point.sinks is not None:
        sinks = point.sinks + np.arange(heads[0], dtype=np.float32)
    if point.quantized is not None:
        case, kv_scales = quantized(case, point.quantized)
    tolerance = TOLERANCES[point.dtype].attention
    is_simulated = backend is Backend.PALLAS_TPU_INTERPRET
    with strictly_simulated() if is_simulated else contextlib.nullcontext():
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
