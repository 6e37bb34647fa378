"""The TPU kernels through the real compiler, on a machine without a TPU."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu.topology import TOPOLOGIES, compile_for_tpu, missing_libtpu
from pallas_kernels import Backend, PagedBatch, paged_attention, pool_shape, write_kv
from pallas_kernels.quantize import is_quantized
from pallas_kernels.tpu import decode
from tests.kernels.hlo import check_pool_stays

pytestmark = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")

HEADS = [(9, 3, 64), (14, 2, 64), (5, 5, 80), (12, 4, 96), (32, 8, 128), (12, 12, 64), (8, 1, 256)]
FEATURES: list[dict[str, Any]] = [
    {"block_size": 8, "dtype": "bfloat16"},
    {"block_size": 16, "dtype": "float32", "window": 300, "soft_cap": 30.0},
    {"block_size": 32, "dtype": "bfloat16", "pool_dtype": "int8", "has_sinks": True},
    {"block_size": 64, "dtype": "bfloat16", "pool_dtype": "float8_e4m3fn", "window": 1000},
    {"block_size": 128, "dtype": "bfloat16", "has_sinks": True, "soft_cap": 50.0},
    {"block_size": 16, "dtype": "float32", "pool_dtype": "int8"},
]
# 128 k tokens a row: all rows' tables are larger than SMEM.
LONG = {"num_rows": 256, "num_tokens": 512, "max_blocks": 8192}


@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)], ids=str)
def test_the_donated_pool_is_written_and_read_in_place(heads: tuple[int, int, int]):
    compiled = compile_for_tpu(f"{__name__}:build_step", options={"heads": heads})
    shape = pool_shape(num_blocks=8192, num_kv_heads=heads[1], block_size=16, head_size=heads[2])
    pool_bytes = 2 * math.prod(shape)
    assert compiled.alias_bytes == pool_bytes  # so it is not padded either
    assert compiled.temporary_bytes < pool_bytes // 8
    check_pool_stays(compiled.hlo, shape)
    for kernel in ("write_kv", "paged_decode", "paged_prefill"):
        assert re.search(rf"{kernel}\S* = .*tpu_custom_call", compiled.hlo), kernel


@pytest.mark.parametrize(
    ("heads", "options"), [((9, 3, 64), FEATURES[2]), ((4, 1, 256), FEATURES[1])], ids=str
)
def test_both_kernels_compile_with_every_option(heads, options: dict[str, Any]):
    compile_for_tpu(f"{__name__}:build_step", options={"heads": heads, **options})


@pytest.mark.parametrize("heads", [(32, 32, 128), (32, 32, 80)], ids=str)
def test_blocks_of_megabytes_compile(heads: tuple[int, int, int]):
    options = {"heads": heads, "block_size": 128, "dtype": "float32", "num_blocks": 512}
    compile_for_tpu(f"{__name__}:build_step", options=options)


def test_blocks_that_no_ring_can_hold_are_refused():
    options = {"heads": (64, 64, 256), "block_size": 256, "dtype": "float32", "num_blocks": 16}
    with pytest.raises(RuntimeError, match=r"MiB of VMEM and this TPU has 128; lower block_size"):
        compile_for_tpu(f"{__name__}:build_step", options=options)


def test_tables_of_a_long_context_compile():
    compile_for_tpu(f"{__name__}:build_step", options=LONG)


def test_what_does_not_compile_says_so():
    with pytest.raises(RuntimeError, match=r"build_refused did not compile for v5e(.|\n)*float16"):
        compile_for_tpu(f"{__name__}:build_refused")


@pytest.mark.kernels
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("options", [*FEATURES, LONG], ids=str)
@pytest.mark.timeout(1000)  # more than the compiler's
def test_every_chip_takes_every_head_count_and_size(chip: str, options: dict[str, Any]):
    compile_for_tpu(
        f"{__name__}:build_all", chip=chip, options={"all_heads": HEADS, **options}, timeout=900
    )


def build_step(
    *,
    heads: tuple[int, int, int] = (9, 3, 64),
    dtype: str = "bfloat16",
    pool_dtype: str | None = None,
    block_size: int = 16,
    num_rows: int = 5,
    num_tokens: int = 70,
    max_blocks: int = 80,
    num_blocks: int = 8192,
    has_sinks: bool = False,
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One layer's use of its donated pool in a mixed step, for `compile_for_tpu`."""
    N, K, H = heads
    spec: Any = jax.ShapeDtypeStruct
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)
    pool = spec(shape, pool_dtype or dtype)
    q, kv = spec((num_tokens, N, H), dtype), spec((num_tokens, K, H), dtype)
    shapes = (num_rows, max_blocks), (num_rows + 1,), (num_rows,), ()
    batch = PagedBatch(*(spec(each, jnp.int32) for each in shapes))
    arrays = {
        "sinks": spec((N,), "float32") if has_sinks else None,
        "kv_scales": spec((2, K), "float32") if is_quantized(pool.dtype) else None,
    }

    def step(pool, q, k, v, slots, batch, arrays):
        # Tables and lengths made inside, as a step makes them from its state.
        batch = jax.tree.map(lambda leaf: leaf + 1, batch)
        common = {"kv_scales": arrays["kv_scales"], "backend": Backend.PALLAS_TPU}
        pool = write_kv(pool, k, v, slots, **common)
        attend = functools.partial(paged_attention, scale=0.2, **options, **common)
        return pool, attend(q, pool, batch, sinks=arrays["sinks"])

    jitted = jax.jit(step, donate_argnums=0)
    return jitted, (pool, q, kv, kv, spec((num_tokens,), jnp.int32), batch, arrays)


def build_all(
    *, all_heads: list[tuple[int, int, int]], **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Such steps of many networks in one program."""
    steps, arguments = zip(
        *(build_step(heads=heads, num_blocks=64, **options) for heads in all_heads), strict=True
    )

    def run(*arguments):
        return [step(*each) for step, each in zip(steps, arguments, strict=True)]

    return run, arguments


def build_refused() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A pool that the kernels do not take."""
    spec = jax.ShapeDtypeStruct
    pool, q = spec((64, 3, 16, 128), "float16"), spec((5, 9, 64), "float16")
    tables, lens = spec((5, 80), jnp.int32), spec((5,), jnp.int32)
    return functools.partial(decode.paged_decode, scale=0.2), (q, pool, tables, lens)
