"""The ragged GPU kernel through Triton's lowering, and the real compiler where it is installed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.builds import HEADS, build_prefill
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.topology import compile_for_gpu, missing_cuda
from tests.kernels.gpu_topology import EIGHT_BITS, num_lowered_for_cuda

with_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


@pytest.mark.parametrize(
    "options",
    [
        *({"heads": heads} for heads in HEADS),
        {"dtype": "float16", "window": 300, "soft_cap": 30.0},
        {"dtype": "float32", "block_size": 128},
        {"pool_dtype": "int8"},
        {"pool_dtype": "float8_e4m3fn", "dtype": "float32"},
    ],
    ids=str,
)
def test_prefill_lowers_for_cuda(options: dict[str, Any]):
    assert num_lowered_for_cuda(*build_prefill(**options)) == 1


def test_prefill_with_sinks_lowers_for_cuda():
    assert num_lowered_for_cuda(*build_prefill(sinks=jnp.zeros(9))) == 1


@with_compiler
@pytest.mark.parametrize("pool_dtype", [None, *EIGHT_BITS])
@pytest.mark.parametrize("chip", GPUS)
@pytest.mark.timeout(700)  # more than the compiler's
def test_prefill_fits_registers_and_shared_memory(chip: str, pool_dtype: str | None):
    options = {"pool_dtype": pool_dtype}
    build = functools.partial(
        compile_for_gpu, f"{__name__}:build_all", chip=chip, options=options, timeout=600
    )
    if (chip, pool_dtype) == ("sm_80", "float8_e4m3fn"):
        with pytest.raises(RuntimeError, match=r"capability 8\.9, this GPU has 8\.0"):
            build()
        return
    compiled = build()
    assert any(kernel.name == "paged_prefill" for kernel in compiled.kernels)
    for kernel in compiled.kernels:
        assert kernel.shared_bytes <= GPUS[chip].most_shared_bytes


@with_compiler
@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)], ids=str)
def test_the_answer_takes_the_place_of_a_donated_query(heads: tuple[int, int, int]):
    compiled = compile_for_gpu(f"{__name__}:build_donated", options={"heads": heads})
    query_bytes = 2 * 2048 * heads[0] * heads[2]
    assert compiled.alias_bytes == query_bytes
    assert compiled.temporary_bytes < query_bytes // 64
    for kernel in compiled.kernels[:-1]:  # nor are the other tokens so much as touched
        assert math.prod(kernel.grid) * kernel.threads * 8 < query_bytes // 2


def build_all(*, pool_dtype: str | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Prefill by every default size in one program, with the options, which take registers."""
    options = {"block_size": 128, "window": 1000, "soft_cap": 30.0, "pool_dtype": pool_dtype}
    cases = [
        build_prefill(heads=heads, dtype=dtype, sinks=jnp.zeros(heads[0]), **options)
        for heads in ((9, 3, 64), (8, 2, 80), (32, 8, 128), (4, 1, 256))
        for dtype in ("bfloat16", "float32")
    ]
    functions = [function for function, _ in cases]

    def attend(*arguments):
        return [function(*each) for function, each in zip(functions, arguments, strict=True)]

    return attend, tuple(arguments for _, arguments in cases)


def build_donated(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Prefill whose caller has no more use for the query."""
    function, arguments = build_prefill(**options)
    return jax.jit(function, donate_argnums=0), arguments
