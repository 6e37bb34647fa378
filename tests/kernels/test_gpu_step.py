"""A whole step compiled for a GPU: what the host has to do for it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.topology import compile_for_gpu, missing_cuda, missing_mosaic
from jpaged.buckets import Buckets
from jpaged.config import EngineConfig
from jpaged.programs import PlainStep
from jpaged.step import Step
from jpaged_models import abstract_decoder
from pallas_kernels import Backend
from tests.helpers import SMOLLM2, tiny_config

missing = {Backend.PALLAS_GPU: missing_cuda(), Backend.MOSAIC_GPU: missing_mosaic()}
compilable = [
    pytest.param(name.value, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))
    for name, reason in missing.items()
]


@pytest.mark.parametrize("backend", compilable)
@pytest.mark.parametrize("phase", ["decode", "mixed"])
def test_a_step_is_one_graph_that_the_host_starts_and_leaves(phase: str, backend: str):
    # A loop or a condition beside it would have the host wait for the device, in every step. So
    # would a slice that XLA of JAX 0.11 hands to a Mosaic kernel where it lies, which then fails.
    options = {"phase": phase, "backend": backend}
    compiled = compile_for_gpu(f"{__name__}:build_step", options=options)
    assert compiled.run == ["CommandBuffer"]
    assert "paged_decode" in compiled.hlo, "the kernels are in it"
    assert compiled.alias_bytes > 2 * pool_bytes(), "pool and state are donated"


def build_step(*, phase: str, backend: str) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The largest step of two of SmolLM2's layers."""
    config = tiny_config(**SMOLLM2, num_layers=2, layer_windows=(None, None))
    buckets = Buckets(max_num_seqs=8, max_num_batched_tokens=64)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16)
    step = Step(decoder, limits(), pool_dtype=jnp.bfloat16, backend=Backend(backend))
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
