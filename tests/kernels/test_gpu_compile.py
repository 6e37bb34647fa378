"""The GPU kernels through Triton's lowering, and the real compiler where it is installed."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks.gpu.builds import HEADS, build_decode
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.topology import compile_for_gpu, missing_cuda
from pallas_kernels import pool_shape
from tests.kernels.gpu_topology import EIGHT_BITS, num_lowered_for_cuda
from tests.kernels.write_before import write_before

with_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_lowers_for_cuda(heads: tuple[int, int, int], dtype: str):
    assert num_lowered_for_cuda(*build_decode(heads=heads, dtype=dtype)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"window": 300, "soft_cap": 30.0},
        {"block_size": 128},
        {"pool_dtype": "int8"},
        {"pool_dtype": "float8_e4m3fn", "dtype": "float32"},
    ],
    ids=str,
)
def test_decode_with_options_lowers_for_cuda(options: dict[str, Any]):
    assert num_lowered_for_cuda(*build_decode(**options)) == 2


def test_one_split_needs_no_merge():
    assert num_lowered_for_cuda(*build_decode(max_blocks=16)) == 1


def test_sinks_are_the_merges_whatever_the_splits():
    assert num_lowered_for_cuda(*build_decode(max_blocks=16, sinks=jnp.zeros(9))) == 2


@with_compiler
@pytest.mark.parametrize("pool_dtype", [None, *EIGHT_BITS])
@pytest.mark.parametrize("chip", GPUS)
def test_decode_fits_registers_and_shared_memory(chip: str, pool_dtype: str | None):
    options = {"pool_dtype": pool_dtype}
    if (chip, pool_dtype) == ("sm_80", "float8_e4m3fn"):
        with pytest.raises(RuntimeError, match=r"capability 8\.9, this GPU has 8\.0"):
            compile_for_gpu(f"{__name__}:build_all", chip=chip, options=options)
        return
    compiled = compile_for_gpu(f"{__name__}:build_all", chip=chip, options=options)
    names = [kernel.name.split("__")[0] for kernel in compiled.kernels]  # a number tells them apart
    assert (
        names.count("paged_decode") == names.count("merge_splits") == len(build_all(**options)[1])
    )
    for kernel in compiled.kernels:
        assert kernel.shared_bytes <= GPUS[chip].most_shared_bytes


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


def build_all(*, pool_dtype: str | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Decode by every default cut in one program."""

    def options(place: int, num_heads: int) -> dict[str, Any]:
        more = {"block_size": 128, "window": 1000, "soft_cap": 30.0, "sinks": jnp.zeros(num_heads)}
        return more if place % 2 else {}

    cases = [
        build_decode(heads=heads, dtype=dtype, pool_dtype=pool_dtype, **options(place, heads[0]))
        for dtype in ("bfloat16", "float32")
        for place, heads in enumerate(HEADS)
        if (heads[2], dtype) != (256, "float32") or pool_dtype is None  # that spills
    ]
    functions = [function for function, _ in cases]

    def attend(*arguments):
        return [function(*each) for function, each in zip(functions, arguments, strict=True)]

    return attend, tuple(arguments for _, arguments in cases)


def build_write_and_decode(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step's use of one layer's pool, donated: new K and V are written, then read."""
    return write_before(*build_decode(**options))
