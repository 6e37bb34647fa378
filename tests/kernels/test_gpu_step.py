"""A whole step compiled for a GPU: what the host has to do for it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.topology import compile_for_gpu, missing_cuda
from jpaged.buckets import Buckets
from jpaged.config import EngineConfig
from jpaged.programs import PlainStep
from jpaged.step import Step
from jpaged_models import abstract_decoder
from pallas_kernels import Backend
from tests.helpers import SMOLLM2, tiny_config

with_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


@with_compiler
@pytest.mark.parametrize("phase", ["decode", "mixed"])
def test_a_step_is_one_graph_that_the_host_starts_and_leaves(phase: str):
    # A loop or a condition beside it would have the host wait for the device, in every step.
    compiled = compile_for_gpu(f"{__name__}:build_step", options={"phase": phase})
    assert compiled.run == ["CommandBuffer"]
    names = {kernel.name.split("__")[0] for kernel in compiled.kernels}
    assert "paged_decode" in names, "the kernels are in it"
    assert compiled.alias_bytes > 2 * pool_bytes(), "pool and state are donated"


def build_step(*, phase: str) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The largest step of two of SmolLM2's layers."""
    config = tiny_config(**SMOLLM2, num_layers=2, layer_windows=(None, None))
    buckets = Buckets(max_num_seqs=8, max_num_batched_tokens=64)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16)
    step = Step(decoder, limits(), pool_dtype=jnp.bfloat16, backend=Backend.PALLAS_GPU)
    return step.define(PlainStep(getattr(buckets, phase)[-1]))


def limits() -> EngineConfig:
    """Of an engine of eight rows."""
    return EngineConfig(
        block_size=16,
        num_blocks=129,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=1024,
    )


def pool_bytes() -> int:
    """Of one layer."""
    return limits().num_blocks * 3 * 16 * 2 * 64 * 2
