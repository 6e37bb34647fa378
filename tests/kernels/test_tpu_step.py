"""The engine's whole step, compiled for a TPU that is not there."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu.topology import TOPOLOGIES, Compiled, compile_for_tpu, missing_libtpu
from jpaged import programs
from jpaged.buckets import Bucket
from jpaged.config import EngineConfig
from jpaged.memory import block_bytes, pool_bytes
from jpaged.programs import PlainStep
from jpaged.step import Step
from jpaged_models import Phase, abstract_decoder
from pallas_kernels import Backend
from tests.helpers import SMOLLM2, tiny_config
from tests.kernels.hlo import check_pool_stays

LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_size": 128,
    "max_position_embeddings": 8192,
}
# Rows of K and V that fill no registers: on a TPU 160 lanes take the room of 256.
LANES160 = SMOLLM2 | {"vocab_size": 2048, "num_heads": 5, "num_kv_heads": 5, "head_size": 80}
# Networks, and as many blocks that a slab is larger than the embedding and than VMEM: that no
# temporary is as large says something.
MODELS = {"smollm2": (SMOLLM2, 32768), "llama3-8b": (LLAMA3_8B, 8192), "lanes160": (LANES160, 8192)}
HBM_GIB = {"v5e": 15.75, "v6e": 31.25}
VMEM_BYTES = 128 << 20  # temporaries stay in it or not, by a choice of XLA's that the pool changes
COMPILE_SECONDS = 900  # at most; a test compiles up to two programs
PADDING = 1 << 20  # of small arrays, to whole registers
TARGET = f"{__name__}:build_step"
KERNELS = {"decode": ["write_kv", "paged_decode"]}
KERNELS["mixed"] = [*KERNELS["decode"], "paged_prefill"]

pytestmark = [
    pytest.mark.skipif(missing_libtpu() is not None, reason=str(missing_libtpu())),
    pytest.mark.timeout(2 * COMPILE_SECONDS + 200),
]


@pytest.mark.parametrize(
    "bucket",
    [
        {"phase": "decode", "num_tokens": 8, "num_rows": 8},
        {"phase": "mixed", "num_tokens": 64, "num_rows": 16},
    ],
    ids=["decode", "mixed"],
)
def test_step_compiles_for_v5e_with_the_pool_in_place(bucket: dict[str, Any]):
    check_compiled("v5e", {"model": "smollm2", "num_layers": 2, **bucket})


def test_a_pool_of_rows_that_leave_lanes_empty_stays_in_place():
    bucket = {"phase": "mixed", "num_tokens": 64, "num_rows": 16}
    check_compiled("v5e", {"model": "lanes160", "num_layers": 1, **bucket})


def test_the_empty_pool_comes_as_the_steps_want_it():
    options = {"model": "lanes160", "num_layers": 1, "program": "Zeros"}
    compiled = compile_for_tpu(f"{__name__}:build_program", options=options)
    pool = compiled.extra[0]["pool"]
    assert pool <= compiled.output_bytes < pool + PADDING


@pytest.mark.parametrize("program", ["Prepare", "ReadBlocks", "WriteBlocks"])
def test_no_program_beside_the_steps_copies_a_pool(program: str):
    options = {"model": "lanes160", "num_layers": 1, "program": program}
    compiled = compile_for_tpu(f"{__name__}:build_program", options=options)
    expected: dict[str, Any] = compiled.extra[0]
    is_read = program == "ReadBlocks"
    assert compiled.argument_bytes >= expected["pool"]
    assert compiled.alias_bytes >= (0 if is_read else expected["pool"])
    assert compiled.temporary_bytes < expected["pool"] // 8
    check_pool_stays(compiled.hlo, expected["pool_shape"])


@pytest.mark.kernels
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("phase", KERNELS)
def test_full_buckets_compile_for_every_chip(chip: str, model: str, phase: str):
    check_compiled(chip, {"model": model, "num_layers": 2, **full_bucket(phase)})


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("chip", "model", "num_layers"), [("v5e", "smollm2", 30), ("v6e", "llama3-8b", 32)]
)
@pytest.mark.parametrize("phase", KERNELS)
def test_all_layers_fit_beside_the_pool_that_memory_fraction_grants(
    chip: str, model: str, num_layers: int, phase: str
):
    options = {"model": model, "num_layers": num_layers}
    bucket = full_bucket(phase)
    limit = int(HBM_GIB[chip] * 2**30)
    small = compile_for_tpu(
        TARGET,
        chip=chip,
        options={**options, **bucket, "num_blocks": 64},
        timeout=COMPILE_SECONDS,
    )
    expected: dict[str, Any] = small.extra[0]
    temporaries = small.temporary_bytes + small.output_bytes - small.alias_bytes
    granted = pool_bytes(
        FakeDevice(limit, expected["params"]),
        memory_fraction=0.9,
        temporaries=temporaries,
        least=0,
        wanted=limit,
    )
    num_blocks = granted // (expected["pool"] // 64)
    compiled = check_compiled(chip, {**options, **bucket, "num_blocks": num_blocks})
    total = compiled.argument_bytes + compiled.output_bytes - compiled.alias_bytes
    total += compiled.temporary_bytes
    # Weights are on the device before, padding included; here they are counted without.
    padding = small.argument_bytes - expected["params"] - small.alias_bytes
    assert total <= 0.9 * limit + padding + expected["state"] + VMEM_BYTES


def full_bucket(phase: str) -> dict[str, Any]:
    return {"phase": phase, "num_tokens": 256 if phase == "mixed" else 64, "num_rows": 64}


@dataclasses.dataclass
class FakeDevice:
    """A device with the weights on it."""

    limit: int
    in_use: int
    platform: str = "tpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


def check_compiled(chip: str, options: dict[str, Any]) -> Compiled:
    """Compiles; checks the pool's place, the kernels, and that memory is what is expected."""
    compiled = compile_for_tpu(TARGET, chip=chip, options=options, timeout=COMPILE_SECONDS)
    expected: dict[str, Any] = compiled.extra[0]
    donated = expected["pool"] + expected["state"]
    assert donated <= compiled.alias_bytes < donated + PADDING, "what is donated stays in place"
    arguments = donated + expected["params"]
    assert arguments <= compiled.argument_bytes < 1.01 * arguments + PADDING
    assert compiled.output_bytes - compiled.alias_bytes < PADDING
    assert compiled.temporary_bytes < expected["slab"]
    check_pool_stays(compiled.hlo, expected["pool_shape"])
    kernels = KERNELS[options["phase"]]
    for kernel in kernels:
        calls = re.findall(rf"%{kernel}[\w.]* = .*tpu_custom_call", compiled.hlo)
        assert len(calls) == options["num_layers"], kernel
    assert compiled.hlo.count('"tpu_custom_call"') == len(kernels) * options["num_layers"]
    return compiled


def build_step(
    *,
    model: str,
    phase: str,
    num_tokens: int,
    num_rows: int,
    num_layers: int,
    num_blocks: int | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """A step of a network without weights, and bytes that `jpaged.memory` expects."""
    step, expected = abstract_step(model, num_layers=num_layers, num_blocks=num_blocks)
    function, specs = step.define(PlainStep(Bucket(Phase(phase), num_tokens, num_rows)))
    params, (slab, *_), state, _ = specs
    expected |= {"params": num_bytes(params), "state": num_bytes(state), "slab": num_bytes(slab)}
    return function, specs, expected


def build_program(*, model: str, num_layers: int, program: str) -> tuple[Any, Any, dict[str, Any]]:
    """A program of the pool alone."""
    step, expected = abstract_step(model, num_layers=num_layers)
    return *step.define(getattr(programs, program)()), expected


def abstract_step(
    model: str, *, num_layers: int, num_blocks: int | None = None
) -> tuple[Step, dict[str, Any]]:
    """The programs of a network without weights, and what its pool should be like."""
    shape, num_slab_blocks = MODELS[model]
    config = tiny_config(**shape, num_layers=num_layers, layer_windows=(None,) * num_layers)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16)
    limits = EngineConfig(
        block_size=16,
        num_blocks=num_blocks or num_slab_blocks,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_model_len=2048,
    )
    kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "backend": Backend.PALLAS_TPU}
    size = block_bytes(config, block_size=16, **kinds)
    step = Step(decoder, limits, pool_dtype=kinds["dtype"], backend=kinds["backend"])
    (slab, *_), _ = jax.eval_shape(step.zeros)
    return step, {"pool": limits.num_blocks * size, "pool_shape": slab.shape}


def num_bytes(specs: Any) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in jax.tree.leaves(specs))
