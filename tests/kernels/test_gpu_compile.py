"""The GPU kernels through Triton's lowering, and the real compiler where it is installed."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import pool_shape
from pallas_kernels.gpu import decode
from tests.kernels.gpu_topology import (
    GPUS,
    HEADS,
    compile_for_gpu,
    missing_cuda,
    num_lowered_for_cuda,
)
from tests.kernels.write_before import write_before

with_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_lowers_for_cuda(heads: tuple[int, int, int], dtype: str):
    assert num_lowered_for_cuda(*build_decode(heads=heads, dtype=dtype)) == 2


@pytest.mark.parametrize(
    "options", [{"window": 300, "soft_cap": 30.0}, {"block_size": 128}], ids=str
)
def test_decode_with_options_lowers_for_cuda(options: dict[str, Any]):
    assert num_lowered_for_cuda(*build_decode(**options)) == 2


def test_one_split_needs_no_merge():
    assert num_lowered_for_cuda(*build_decode(max_blocks=16)) == 1


def test_sinks_are_the_merges_whatever_the_splits():
    assert num_lowered_for_cuda(*build_decode(max_blocks=16, sinks=jnp.zeros(9))) == 2


@with_compiler
@pytest.mark.parametrize("chip", GPUS)
def test_decode_fits_registers_and_shared_memory(chip: str):
    compiled = compile_for_gpu(f"{__name__}:build_all", chip=chip)
    names = [kernel.name.split("__")[0] for kernel in compiled.kernels]  # a number tells them apart
    assert sorted(names) == [*["merge_splits"] * (len(names) // 2), *["paged_decode"] * 12]
    for kernel in compiled.kernels:
        assert kernel.shared_bytes < GPUS[chip].shared_memory - 1 << 10


@with_compiler
@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)])
def test_decode_reads_the_donated_pool_in_place_right_after_it_was_written(
    heads: tuple[int, int, int],
):
    compiled = compile_for_gpu(f"{__name__}:build_write_and_decode", options={"heads": heads})
    shape = pool_shape(num_blocks=4096, num_kv_heads=heads[1], block_size=16, head_size=heads[2])
    pool_bytes = 2 * math.prod(shape)
    assert compiled.alias_bytes == pool_bytes
    assert compiled.temporary_bytes < pool_bytes // 64
    pool = rf"bf16\[({','.join(map(str, shape))}|{math.prod(shape[:3])},{shape[3]})\]"
    assert re.search(rf" = {pool}\S* (parameter|fusion|bitcast|scatter)\(", compiled.hlo)
    assert not re.search(rf" = {pool}\S* (copy|copy-start|transpose|convert)\(", compiled.hlo)


def build_decode(
    *,
    heads: tuple[int, int, int] = (9, 3, 64),
    dtype: str = "bfloat16",
    block_size: int = 16,
    num_rows: int = 5,
    max_blocks: int = 80,
    num_blocks: int = 4096,
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Decode over a pool of `num_blocks`, for `compile_for_gpu`."""
    N, K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)
    return functools.partial(decode.paged_decode, scale=0.2, **options), (
        jax.ShapeDtypeStruct((num_rows, N, H), dtype),
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((num_rows, max_blocks), jnp.int32),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    )


def build_all() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Decode by every default cut in one program."""

    def options(place: int, num_heads: int) -> dict[str, Any]:
        more = {"block_size": 128, "window": 1000, "soft_cap": 30.0, "sinks": jnp.zeros(num_heads)}
        return more if place % 2 else {}

    cases = [
        build_decode(heads=heads, dtype=dtype, **options(place, heads[0]))
        for dtype in ("bfloat16", "float32")
        for place, heads in enumerate(HEADS)
    ]
    functions = [function for function, _ in cases]

    def attend(*arguments):
        return [function(*each) for function, each in zip(functions, arguments, strict=True)]

    return attend, tuple(arguments for _, arguments in cases)


def build_write_and_decode(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step's use of one layer's pool, donated: new K and V are written, then read."""
    return write_before(*build_decode(**options))
