"""The Hopper kernels through the real compiler, where it is installed."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.assembled import read_registers
from benchmarks.gpu.builds import Built, build_prefill
from benchmarks.gpu.topology import compile_for_gpu, missing_mosaic
from pallas_kernels import Backend, paged_attention
from pallas_kernels.gpu.mosaic.limits import missing_jax

with_compiler = pytest.mark.skipif(missing_mosaic() is not None, reason=missing_mosaic() or "")
CASES: list[dict[str, Any]] = [
    {"heads": (32, 8, 128)},
    {"heads": (14, 2, 64), "dtype": "float16", "block_size": 8, "every_option": True},
    {"heads": (9, 3, 64), "block_size": 128},
    {"heads": (32, 8, 128), "block_size": 8},
    {"heads": (16, 1, 128), "block_size": 8, "every_option": True},
]
SHORT, LONG = CASES[:2], [pytest.param(case, marks=pytest.mark.kernels) for case in CASES[2:]]
REGISTERS = {"paged_decode": 200, "merge_splits": 128, "paged_prefill": 168}  # at the start


@with_compiler
@pytest.mark.parametrize("options", [*SHORT, *LONG], ids=str)
def test_no_register_is_spilled(options: dict[str, Any]):
    compiled = compile_for_gpu(f"{__name__}:build", options=options)
    taken = read_registers(compiled.log)
    for name, most in REGISTERS.items():
        registers, spilled = taken[f"{name}_mosaic_gpu_kernel"]
        assert spilled == 0, name
        assert registers <= most, name


@pytest.mark.skipif(missing_jax(interpreted=False) is not None, reason="it has no such kernels")
def test_warpgroups_ask_for_no_more_registers_than_the_program_starts_with():
    from pallas_kernels.gpu.mosaic import prefill

    for compute, load in (prefill.REGISTERS, prefill.MORE_REGISTERS):
        assert 2 * compute + load <= 3 * REGISTERS["paged_prefill"]


@with_compiler
def test_the_answer_takes_the_place_of_the_query_and_the_pool_is_not_copied():
    compiled = compile_for_gpu(f"{__name__}:build_donated", options={"heads": (32, 8, 128)})
    _, (q, pool, *_) = build(heads=(32, 8, 128))
    assert compiled.alias_bytes == 2 * math.prod(q.shape)
    assert compiled.temporary_bytes < 2 * math.prod(pool.shape) // 4
    dims = ",".join(map(str, pool.shape))
    assert f"bf16[{dims}]" in compiled.hlo
    assert not [
        line for line in compiled.hlo.splitlines() if f"= bf16[{dims}]" in line and " copy(" in line
    ]


def build(*, every_option: bool = False, **shape: Any) -> Built:
    """A mixed batch: decode, merge and prompts."""
    options = {"window": 1000, "soft_cap": 30.0} if every_option else {}
    _, (q, pool, batch, _) = build_prefill(**shape)
    if every_option:
        options["sinks"] = jnp.zeros(shape["heads"][0])
    attend = functools.partial(paged_attention, scale=0.2, backend=Backend.MOSAIC_GPU, **options)
    return attend, (q, pool, batch)


def build_donated(**shape: Any) -> Built:
    """The same where nobody needs the query any more."""
    attend, arguments = build(**shape)
    return jax.jit(attend, donate_argnums=0), arguments
