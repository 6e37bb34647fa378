"""Writes and block copies for a GPU: interpreted against NumPy, lowered, and really compiled.

The pool before is random bits, NaN among them: what is not written keeps its bits.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.topology import compile_for_gpu, missing_cuda
from pallas_kernels import Backend, pool_shape, reference
from pallas_kernels import write_kv as dispatched_write
from pallas_kernels.gpu import copy
from pallas_kernels.gpu.write import write_kv
from pallas_kernels.quantize import LARGEST, quantize
from tests.kernels.gpu_topology import EIGHT_BITS, num_lowered_for_cuda

with_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")
P, K, S, H = 7, 3, 8, 10
HEADS = [(8, 128), (3, 64), (2, 80), (5, 96), (1, 256)]
DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
# The others are in the long matrix.
CHIPS = [*(pytest.param(chip, marks=pytest.mark.kernels) for chip in list(GPUS)[:-1]), "sm_90a"]
SCALE = 0.5  # so that a quarter of an even number is half of a step: a tie
NUM_LAYERS = 32
MAX_PARAMETERS = 4 << 10  # bytes of a kernel's parameters


class Case(NamedTuple):
    """A write's arguments, and the pool that the reference makes of them."""

    pool: jax.Array
    k: jax.Array
    v: jax.Array
    slots: jax.Array
    kv_scales: jax.Array | None
    expected: jax.Array


def make_case(
    slots: Sequence[int],
    *,
    num_tokens: int = 40,  # one shape, compiled once
    shape: tuple[int, int, int, int] = (P, K, S, H),
    dtype: str = "float32",
    kv_dtype: str = "float32",
) -> Case:
    """The slots, and then those of padding tokens; what no pool has and the null block's stay."""
    rng = np.random.default_rng(0)
    P, K, S, H = shape
    slots = [*slots, *[0] * (num_tokens - len(slots))]
    pool = jnp.asarray(random_bits(rng, (P, K, S, 2 * H), dtype))
    k, v = (
        jnp.asarray(np.round(rng.standard_normal((len(slots), K, H)) * 150) / 4, kv_dtype)
        for _ in range(2)
    )
    kv_scales = None
    rows = jnp.concatenate([k, v], axis=-1).astype(dtype)
    if dtype in LARGEST:
        kv_scales = SCALE * jnp.arange(1, 1 + 2 * K, dtype=jnp.float32).reshape(2, K)
        rows = quantize(k, v, kv_scales, dtype)
    live = np.array([S <= slot < P * S for slot in slots])
    expected = pool
    if live.any():
        expected = reference.write_kv(pool, rows[live], jnp.asarray(slots, jnp.int32)[live])
    return Case(pool, k, v, jnp.asarray(slots, jnp.int32), kv_scales, expected)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    *rows, lanes = shape
    bits = rng.integers(0, 256, (*rows, lanes * jnp.dtype(dtype).itemsize), np.uint8)
    if dtype == "bfloat16":  # of which JAX 0.10 keeps but one kind of NaN on a CPU
        halves = bits.view("u2")
        halves[(halves & 0x7FFF) > 0x7F80] = 0x7FC0
    return bits.view(jnp.dtype(dtype))


def by_kernel(case: Case) -> jax.Array:
    pool, k, v, slots, kv_scales, _ = case
    return write_interpreted(pool, k, v, slots, kv_scales=kv_scales)


def by_scatter(case: Case) -> jax.Array:
    pool, k, v, slots, kv_scales, _ = case
    return dispatched_write(pool, k, v, slots, kv_scales=kv_scales, backend=Backend.PALLAS_GPU)


write_interpreted = jax.jit(functools.partial(write_kv, interpret=True))
each_way = pytest.mark.parametrize("write", [by_kernel, by_scatter])


def check(found: jax.Array, expected: jax.Array | np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(found).view("u1"), np.asarray(expected).view("u1"))


def run(block: int, start: int, end: int) -> list[int]:
    return list(range(block * S + start, block * S + end))


@each_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_any_blocks_among_padding_agree_with_the_reference(
    write: Callable[[Case], jax.Array], dtype: str
):
    slots = [*run(3, 7, 8), 0, *run(1, 0, 1), 5, *run(6, 0, 8), *run(2, 5, 8), *run(5, 0, 3)]
    case = make_case(slots, dtype=dtype)
    check(write(case), case.expected)


@each_way
def test_blocks_that_the_pool_does_not_have_are_left_out(write: Callable[[Case], jax.Array]):
    case = make_case([-1, P * S, *run(2, 1, 3), P * S + 40, -70])
    check(write(case), case.expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("bfloat16", "bfloat16"),
        pytest.param("int8", "float16", marks=pytest.mark.kernels),
        pytest.param("float32", "bfloat16", marks=pytest.mark.kernels),
    ],
)
def test_head_sizes_and_dtypes_of_k_and_v_agree_with_the_reference(
    heads: tuple[int, int], dtype: str, kv_dtype: str
):
    K, H = heads
    shape = (4, K, 16, H)
    case = make_case([17, 63, 31, 48], num_tokens=9, shape=shape, dtype=dtype, kv_dtype=kv_dtype)
    check(by_kernel(case), case.expected)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.lists(st.integers(S, P * S + 3), max_size=40, unique=True))
def test_any_distinct_slots_agree_with_the_reference(slots: list[int]):
    case = make_case(slots)
    check(by_kernel(case), case.expected)
    check(by_scatter(case), case.expected)


def test_a_wrong_shape_is_refused_by_the_annotations():
    case = make_case([9, 4], num_tokens=2)
    with pytest.raises(TypeCheckError):
        write_kv(case.pool, case.k, case.v, case.slots[:1])
    with pytest.raises(TypeCheckError):
        copy.copy_blocks((case.pool,), jnp.zeros((4, 3), jnp.int32), jnp.int32(0))


def copied(pools: Sequence[np.ndarray], copies: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """What NumPy makes of the pools."""
    expected = [pool.copy() for pool in pools]
    for pool in expected:
        for source, destination in copies:
            pool[destination] = pool[source]
    return expected


def check_copies(
    copies: Sequence[tuple[int, int]], *, count: int, dtype: str = "bfloat16", num_layers: int = 3
) -> None:
    rng = np.random.default_rng(1)
    pools = [random_bits(rng, (P, K, S, 2 * H), dtype) for _ in range(num_layers)]
    padded = np.zeros((6, 2), np.int32)
    padded[: len(copies)] = np.reshape(copies, (-1, 2))
    found = copy_interpreted(tuple(map(jnp.asarray, pools)), padded, np.int32(count))
    for layer, expected in enumerate(copied(pools, copies[:count])):
        check(found[layer], expected)


copy_interpreted = jax.jit(functools.partial(copy.copy_blocks, interpret=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_done_in_order_and_no_more_than_count(dtype: str):
    chain = [(1, 2), (2, 5), (5, 1), (3, 2), (4, 6)]
    check_copies(chain, count=4, dtype=dtype)


def test_no_copies_change_nothing():
    check_copies([(1, 2)], count=0)


def test_blocks_of_several_pieces_agree_with_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copy, "TILE_BYTES", 256)  # which does not divide a block
    check_copies([(1, 2), (2, 5), (5, 1)], count=3, dtype="float16", num_layers=1)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    copies=st.lists(st.tuples(st.integers(0, P - 1), st.integers(0, P - 1)), max_size=6),
    ignored=st.integers(0, 6),
)
def test_any_copies_agree_with_numpy(copies: list[tuple[int, int]], ignored: int):
    check_copies(copies, count=max(0, len(copies) - ignored))


def test_a_pool_of_eight_bits_whose_offsets_overflow_is_refused():
    pool = jax.ShapeDtypeStruct((1 << 17, 8, 16, 256), jnp.int8)
    copies, count = jax.ShapeDtypeStruct((6, 2), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match="make it of fewer blocks, or use `xla`"):
        jax.eval_shape(copy.copy_blocks, (pool,), copies, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_lower_for_cuda(dtype: str):
    builds = [build_write(heads=heads, dtype=dtype) for heads in HEADS]
    assert num_lowered_for_cuda(*together(builds)) == len(HEADS)


def test_all_layers_copies_are_one_kernel_lowered_for_cuda():
    function, arguments = build_copies()
    assert num_lowered_for_cuda(function, arguments) == 1
    pointers = 2 + 2 * len(arguments[0])
    assert 8 * pointers < MAX_PARAMETERS


@with_compiler
@pytest.mark.parametrize("pool_dtype", [None, *EIGHT_BITS])
@pytest.mark.parametrize("chip", CHIPS)
def test_writes_compile_without_a_spill_into_the_donated_pool(chip: str, pool_dtype: str | None):
    if (chip, pool_dtype) == ("sm_80", "float8_e4m3fn"):
        pytest.skip("Triton converts to float8_e4m3fn on none below 8.9")
    options = {"pool_dtype": pool_dtype}
    compiled = compile_for_gpu(f"{__name__}:build_writes", chip=chip, options=options)
    pools = build_writes(**options)[1][0]
    check_in_place(compiled, pools)
    names = [kernel.name.split("__")[0] for kernel in compiled.kernels]  # a number tells them apart
    assert names.count("write_kv") == len(pools)


@with_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHT_BITS])
@pytest.mark.parametrize("chip", CHIPS)
def test_copies_compile_to_one_kernel_over_the_donated_pools(chip: str, dtype: str):
    compiled = compile_for_gpu(f"{__name__}:build_copies", chip=chip, options={"dtype": dtype})
    check_in_place(compiled, build_copies(dtype=dtype)[1][0])
    assert [kernel.name for kernel in compiled.kernels] == ["copy_blocks"]
    assert not re.search(r"\bwhile\b", compiled.hlo)


@with_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHT_BITS])
def test_the_scatter_of_a_write_is_one_kernel_that_needs_no_atomics(dtype: str):
    compiled = compile_for_gpu(f"{__name__}:build_scatter", options={"dtype": dtype})
    check_in_place(compiled, build_scatter(dtype=dtype)[1][0])
    assert [kernel.name for kernel in compiled.kernels] == ["input_scatter_fusion"]
    (scatter,) = re.findall(r" scatter\(.*", compiled.hlo)
    assert "unique_indices=true" in scatter


def check_in_place(compiled: Any, pools: Any) -> None:
    """Every pool is donated, and nothing makes another array of its shape."""
    pools = jax.tree.leaves(pools)
    assert compiled.alias_bytes == sum(pool.size * pool.dtype.itemsize for pool in pools)
    assert compiled.temporary_bytes < 4096
    for blocks, heads, slots, lanes in {pool.shape for pool in pools}:
        rest = heads * slots * lanes
        flat = f"{blocks * heads * slots},{lanes}|{blocks},{rest}|{blocks},{heads},{slots},{lanes}"
        assert not re.search(rf" = \w+\[({flat})\]\S* (copy|copy-start|transpose)\(", compiled.hlo)


def together(
    builds: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One function of what is built, its first argument donated: the pools."""
    functions = [function for function, _ in builds]
    pools, *rest = zip(*(arguments for _, arguments in builds), strict=True)

    def call(pools: Any, *rest: Any) -> list[Any]:
        return [f(*each) for f, *each in zip(functions, pools, *rest, strict=True)]

    return jax.jit(call, donate_argnums=0), (pools, *rest)


def build_write(
    *,
    heads: tuple[int, int],
    dtype: str,
    kv_dtype: str = "bfloat16",
    num_tokens: int = 64,
    write: Callable[..., Any] = write_kv,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A write into a pool, for `compile_for_gpu`."""
    K, H = heads
    shape = pool_shape(num_blocks=4096, num_kv_heads=K, block_size=16, head_size=H)
    options = {"kv_scales": jnp.ones((2, K))} if dtype in LARGEST else {}
    kv = jax.ShapeDtypeStruct((num_tokens, K, H), kv_dtype)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    return functools.partial(write, **options), (jax.ShapeDtypeStruct(shape, dtype), kv, kv, slots)


def build_writes(*, pool_dtype: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Writes of every head size, and from each dtype into its own or the given one."""
    kinds = [(heads, dtype) for heads in HEADS for dtype in ("bfloat16", "float16", "float32")]
    return together(
        [
            build_write(heads=heads, dtype=pool_dtype or dtype, kv_dtype=dtype)
            for heads, dtype in kinds
        ]
    )


def build_scatter(*, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What `dispatch` makes of a write on a GPU."""
    write = functools.partial(dispatched_write, backend=Backend.PALLAS_GPU)
    function, arguments = build_write(heads=(8, 128), dtype=dtype, write=write)
    return jax.jit(function, donate_argnums=0), arguments


def build_copies(*, dtype: str = "bfloat16") -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Copies in the pools of a model of many layers."""
    shape = pool_shape(num_blocks=1024, num_kv_heads=8, block_size=16, head_size=128)
    pools = tuple(jax.ShapeDtypeStruct(shape, dtype) for _ in range(NUM_LAYERS))
    copies, count = jax.ShapeDtypeStruct((64, 2), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(copy.copy_blocks, donate_argnums=0), (pools, copies, count)
