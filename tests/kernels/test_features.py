"""Attention sinks and quantised pools on every backend that runs here, against NumPy in float64.

Slots that no row owns hold NaN, or 127 in an int8 pool, and nothing of it may come out.
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

from pallas_kernels import (
    Backend,
    copy_blocks,
    kv_scales_of,
    paged_attention,
    paged_decode,
    read_blocks,
    write_blocks,
    write_kv,
)
from pallas_kernels.quantize import quantize
from tests.helpers import TOLERANCES, assert_close
from tests.kernels.cases import (
    BACKENDS,
    SCALE,
    Case,
    decode,
    dense,
    make_case,
    one_token_a_row,
    quantized,
    rounded,
    run,
)

ROWS = [(1, 1), (1, 17), (1, 150), (7, 7), (3, 30), (80, 300)]
OPTIONS = [{}, {"window": 19, "soft_cap": 3.0}]
# One for each of six heads: next to nothing, low, in between, high, and all there is.
SINKS = np.array([-60, -2, 0.3, 1.7, 8, 90], np.float32)
EIGHT_BITS = ["int8", "float8_e4m3fn"]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_backend_and_gpu = pytest.mark.parametrize("backend", [*BACKENDS, Backend.PALLAS_GPU_INTERPRET])
each_pool = pytest.mark.parametrize("dtype", EIGHT_BITS)


def assert_agrees(case: Case, backend: Backend, dtype: str = "float32", **options: Any) -> None:
    """Both jobs; `kv_scales` are in the case's contexts already."""
    tolerance = TOLERANCES[dtype].attention
    exact = {name: options[name] for name in options if name != "kv_scales"}
    cast = dataclasses.replace(case, q=case.q.astype(jnp.dtype(dtype)))
    found = run(cast, backend, **options)
    assert found.dtype == jnp.dtype(dtype)
    assert_close(found, dense(case, **exact)[: len(found)], tolerance, "ragged")
    rows = one_token_a_row(cast)
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    found = decode(rows.q, case.pool, tables, lens, scale=SCALE, backend=backend, **options)
    assert_close(found, dense(one_token_a_row(case), **exact), tolerance, "decode")
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(lens) == 0], 0)


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sinks_agree_with_dense_attention(backend: Backend, options: dict[str, Any]):
    case = make_case(ROWS)
    assert_agrees(case, backend, sinks=SINKS, **options)
    assert np.abs(dense(case, sinks=SINKS) - dense(case)).max() > 0.1


@each_backend
def test_a_sink_takes_weight_from_all_tokens_alike(backend: Backend):
    case = make_case([(1, 9), (5, 21)])
    sinks = np.full(6, 0.5, np.float32)
    share = run(case, backend, sinks=sinks) / run(case, backend)
    assert_close(share, np.broadcast_to(share[..., :1], share.shape), 1e-4)
    assert (share > 0).all()
    assert (share < 1).all()


@each_backend
@pytest.mark.parametrize("sink", [-np.inf, -3e38, -1e30, -1e4])
def test_a_sink_without_weight_is_none(backend: Backend, sink: float):
    case = make_case([(1, 9), (5, 21)])
    found = run(case, backend, sinks=np.full(6, sink, np.float32))
    assert_close(found, dense(case)[: len(found)], TOLERANCES["float32"].attention)


@each_backend
def test_a_sink_above_everything_leaves_nothing(backend: Backend):
    case = make_case([(1, 9), (5, 21)])
    found = run(case, backend, sinks=np.full(6, 3e38, np.float32))
    np.testing.assert_array_equal(found, 0)


@each_backend
def test_sinks_have_a_dtype_of_their_own(backend: Backend):
    case = rounded(make_case(ROWS), "bfloat16")
    assert_agrees(case, backend, "bfloat16", sinks=SINKS.astype(jnp.bfloat16), window=40)


@each_pool
@pytest.mark.parametrize(
    ("backend", "options"),
    [*itertools.product(BACKENDS, OPTIONS), (Backend.PALLAS_GPU_INTERPRET, OPTIONS[1])],
    ids=str,
)
def test_quantized_pools_agree_with_dense_attention(
    backend: Backend, dtype: str, options: dict[str, Any]
):
    case, kv_scales = quantized(make_case(ROWS), dtype)
    assert_agrees(case, backend, kv_scales=kv_scales, **options)


@pytest.mark.skipif(Backend.CPU not in BACKENDS, reason="needs a C++ compiler")
@each_pool
@pytest.mark.parametrize("head_size", [8, 40, 64, 128])
def test_quantized_head_sizes_agree_with_dense_attention(dtype: str, head_size: int):
    """The C++ kernel has code of its own for 64 and for 128, and ends of rows in the others."""
    case = make_case([(1, 150), (5, 21), (19, 19)], heads=(6, 2, head_size), block_size=16)
    case, kv_scales = quantized(case, dtype)
    assert_agrees(case, Backend.CPU, kv_scales=kv_scales, sinks=SINKS)


@each_backend_and_gpu
@pytest.mark.parametrize(
    ("dtype", "query_dtype"), [("int8", "bfloat16"), ("float8_e4m3fn", "float16")]
)
def test_a_quantized_pool_takes_a_query_of_16_bits(backend: Backend, dtype: str, query_dtype: str):
    case, kv_scales = quantized(rounded(make_case(ROWS), query_dtype), dtype)
    assert_agrees(case, backend, query_dtype, kv_scales=kv_scales)


@each_backend_and_gpu
def test_every_number_of_float8_is_read_as_it_is(backend: Backend):
    """A row of one token gives its value back: subnormals, the largest, both zeros and NaN."""
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    pool = np.zeros((3, 1, 1, 512), jnp.float8_e4m3fn)
    pool[2, 0, 0, 256:] = codes
    q = np.zeros((1, 1, 256), np.float32)
    tables, lens = np.array([[2]], np.int32), np.array([1], np.int32)
    scales = np.ones((2, 1), np.float32)
    found = decode(q, pool, tables, lens, scale=SCALE, kv_scales=scales, backend=backend)
    np.testing.assert_array_equal(np.asarray(found)[0, 0], codes.astype(np.float32))


@each_backend
@each_pool
def test_write_kv_rounds_to_the_nearest_and_cuts_what_is_too_large(backend: Backend, dtype: str):
    K, H, kv_scales = 2, 8, jnp.array([[0.5, 2], [1, 0.25]])
    halves = np.array([0, 0.5, -1.5, 2.5, 17, 18, -1000, np.inf], np.float32)
    k = np.stack([halves * scale for scale in kv_scales[0]])[None]
    v = -np.stack([halves * scale for scale in kv_scales[1]])[None]
    largest = 127 if dtype == "int8" else 448
    expected = np.clip(halves, -largest, largest)
    if dtype == "int8":
        expected = np.rint(expected)  # ties to even: 0, -2 and 2
    else:
        expected[4] = 16  # 17 is as near to 18, whose last bit is odd
    pool = jnp.zeros((3, K, 4, 2 * H), dtype)
    slots = jnp.array([2 * 4 + 3], jnp.int32)
    written = write_kv(
        pool, jnp.asarray(k), jnp.asarray(v), slots, kv_scales=kv_scales, backend=backend
    )
    assert written.dtype == dtype
    found = np.asarray(written, np.float32)
    np.testing.assert_array_equal(found[2, :, 3], np.tile([*expected, *-expected], (K, 1)))
    found[2, :, 3] = 0
    np.testing.assert_array_equal(found, 0)


@each_backend
@each_pool
def test_what_is_written_is_read_within_half_a_step(backend: Backend, dtype: str):
    T, K, H, S = 12, 3, 8, 4
    rng = np.random.default_rng(0)
    heads = np.array([0.01, 1, 300])[None, :, None]  # each with a magnitude of its own
    k, v = (jnp.asarray(rng.standard_normal((T, K, H)) * heads, jnp.float32) for _ in range(2))
    kv_scales = kv_scales_of(k, v, dtype)
    pool, slots = jnp.zeros((5, K, S, 2 * H), dtype), jnp.arange(S, S + T, dtype=jnp.int32)
    pool = write_kv(pool, k, v, slots, kv_scales=kv_scales, backend=backend)
    blocks = read_blocks((pool,), jnp.array([1, 2, 3], jnp.int32))[:, 0]
    stored = np.moveaxis(np.asarray(blocks, np.float64), 1, 2).reshape(T, K, 2, H)
    scales = np.asarray(kv_scales, np.float64).T[None, :, :, None]
    written = np.stack([k, v], axis=2).astype(np.float64)
    # float8 has four bits of significand, and subnormals in steps of 2 ** -9.
    step = scales if dtype == "int8" else np.maximum(np.abs(written) / 8, scales * 2.0**-9)
    assert (np.abs(stored * scales - written) <= step / 2 * (1 + 1e-6)).all()
    assert np.abs(stored).max() == (127 if dtype == "int8" else 448)


@each_pool
def test_scales_are_each_heads_largest_and_never_zero(dtype: str):
    largest = 127 if dtype == "int8" else 448
    k, v = np.zeros((2, 5, 3, 8), np.float32)
    k[3, 0, 2], k[1, 2, 7], v[4, 1, 0], v[0, 2, 1] = -4, 1e-42, 6, 300
    found = np.asarray(kv_scales_of(jnp.asarray(k), jnp.asarray(v), dtype))
    assert (found > 0).all()
    np.testing.assert_allclose(found * largest, [[4, 0, 0], [0, 6, 300]], rtol=1e-6, atol=1e-30)
    rows = quantize(jnp.asarray(k), jnp.asarray(v), jnp.asarray(found), dtype)
    assert np.isfinite(np.asarray(rows, np.float32)).all()


@each_backend
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_blocks_of_few_bits_are_copied_read_and_written_bit_by_bit(dtype: str, backend: Backend):
    rng = np.random.default_rng(0)
    shape = (6, 3, 4, 10)
    unsigned = np.uint16 if dtype == "bfloat16" else np.uint8
    bits = [rng.integers(0, 127, shape).astype(unsigned) for _ in range(2)]
    bits[0][1] = 127  # NaN in float8
    pools = tuple(jnp.asarray(each.view(jnp.dtype(dtype))) for each in bits)
    copies = jnp.array([[1, 4], [3, 1], [5, 2]], jnp.int32)
    copied = jax.jit(functools.partial(copy_blocks, backend=backend))(pools, copies, jnp.int32(2))
    ids = jnp.array([5, 0], jnp.int32)
    blocks = jax.jit(read_blocks)(pools, ids)
    write = jax.jit(functools.partial(write_blocks, backend=backend))
    written = write(pools, jnp.array([2, 6], jnp.int32), blocks)
    for layer, before in enumerate(bits):
        expected = before.copy()
        expected[4], expected[1] = before[1], before[3]
        np.testing.assert_array_equal(np.asarray(copied[layer]).view(unsigned), expected)
        np.testing.assert_array_equal(
            np.asarray(blocks[:, layer]).view(unsigned), before[np.asarray(ids)]
        )
        expected = before.copy()
        expected[2] = before[5]
        np.testing.assert_array_equal(np.asarray(written[layer]).view(unsigned), expected)


def test_xla_makes_no_wider_copy_of_an_int8_pool():
    spec, B, K, H = jax.ShapeDtypeStruct, 8, 3, 64
    pool = spec((2048, K, 16, 2 * H), jnp.int8)
    q, kv = spec((64, 9, H), jnp.float32), spec((64, K, H), jnp.float32)
    tables, lens, slots = (spec(shape, jnp.int32) for shape in ((B, 64), (B,), (64,)))
    batch = dataclasses.replace(
        make_case([(1, 9)]).batch,
        block_tables=tables,
        query_starts=spec((B + 1,), jnp.int32),
        seq_lens=lens,
        num_decodes=spec((), jnp.int32),
    )
    options = {"scale": SCALE, "backend": Backend.XLA}
    scales = spec((2, K), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, q, k, v, slots, batch, kv_scales):
        pool = write_kv(pool, k, v, slots, kv_scales=kv_scales, backend=Backend.XLA)
        return pool, paged_attention(q, pool, batch, kv_scales=kv_scales, **options)

    memory = step.lower(pool, q, kv, kv, slots, batch, scales).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool.size
    assert memory.temp_size_in_bytes < pool.size // 4


@pytest.mark.parametrize(
    "backend", [*BACKENDS, Backend.PALLAS_TPU_INTERPRET, Backend.PALLAS_GPU_INTERPRET]
)
@pytest.mark.parametrize(
    ("pool_dtype", "with_scales", "message"),
    [
        (
            "int8",
            False,
            r"a pool of int8 needs kv_scales of shape \(2, 3\), got None; kv_scales_of",
        ),
        ("float8_e4m3fn", False, "a pool of float8_e4m3fn needs kv_scales"),
        (
            "float32",
            True,
            "for a pool of int8 or float8_e4m3fn, got one of float32; leave them out",
        ),
        ("int32", False, "floating point, or quantised as int8 or float8_e4m3fn, got int32"),
        ("uint8", True, "got uint8"),
        ("float8_e5m2", True, "got float8_e5m2"),
    ],
)
def test_scales_that_do_not_go_with_the_pool_are_refused(
    backend: Backend, pool_dtype: str, with_scales: bool, message: str
):
    case = make_case([(1, 9), (3, 11)], num_padding=1)
    q, pool = jnp.asarray(case.q), jnp.zeros(case.pool.shape, pool_dtype)
    options: Any = {"backend": backend, "kv_scales": jnp.ones((2, 3)) if with_scales else None}
    tables, lens = case.batch.block_tables, case.batch.seq_lens
    with pytest.raises(ValueError, match=message):
        paged_attention(q, pool, case.batch, scale=SCALE, **options)
    with pytest.raises(ValueError, match=message):
        paged_decode(q[: len(lens)], pool, tables, lens, scale=SCALE, **options)
    kv = jnp.zeros((len(q), 3, 16))
    with pytest.raises(ValueError, match=message):
        write_kv(pool, kv, kv, jnp.zeros(len(q), jnp.int32), **options)


def test_a_pool_of_eight_bits_too_large_for_the_gpu_kernels_is_refused():
    spec: Any = jax.ShapeDtypeStruct
    shape = 1 << 17, 8, 16, 256  # 4 GiB, where the offsets of the kernels are int32
    batch = spec((4, 8), jnp.int32), spec((4,), jnp.int32)
    attend = functools.partial(
        paged_decode, scale=SCALE, kv_scales=jnp.ones((2, 8)), backend=Backend.PALLAS_GPU_INTERPRET
    )
    with pytest.raises(ValueError, match="make it of fewer blocks, or use `xla`"):
        jax.eval_shape(attend, spec((4, 8, 128), jnp.float32), spec(shape, jnp.int8), *batch)


def test_scales_for_a_dtype_without_are_refused():
    kv = jnp.ones((4, 3, 8))
    with pytest.raises(ValueError, match="is of int8 or float8_e4m3fn, got float16; another needs"):
        kv_scales_of(kv, kv, jnp.float16)


def test_wrong_shapes_are_refused():
    case = make_case([(1, 9), (3, 11)])
    kv, scales = jnp.ones((4, 3, 8)), jnp.ones((2, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        quantize(kv, kv, scales.T, "int8")
    with pytest.raises(jaxtyping.TypeCheckError):
        run(case, Backend.XLA, sinks=np.zeros(3, np.float32))
