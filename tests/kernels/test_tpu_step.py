"""The engine's whole step, compiled for a TPU that is not there."""

from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks.tpu.topology import compile_for_tpu, missing_libtpu
from jpaged.buckets import Bucket
from jpaged.config import EngineConfig
from jpaged.programs import PlainStep
from jpaged.step import Step
from jpaged_models import Phase, abstract_decoder
from pallas_kernels import Backend
from tests.helpers import SMOLLM2, tiny_config

NUM_BLOCKS = 32768  # a slab larger than the embedding and than VMEM: the bound says something
SLAB_BYTES = NUM_BLOCKS * 3 * 16 * 128 * 2  # one layer of the pool below

pytestmark = pytest.mark.skipif(missing_libtpu() is not None, reason=str(missing_libtpu()))


def build_step(*, phase: str, num_tokens: int, num_rows: int, num_layers: int) -> tuple[Any, Any]:
    """The step of a network shaped like SmolLM2, without weights."""
    config = tiny_config(**SMOLLM2, num_layers=num_layers, layer_windows=(None,) * num_layers)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16)
    limits = EngineConfig(
        block_size=16,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_model_len=2048,
    )
    step = Step(decoder, limits, pool_dtype=jnp.bfloat16, backend=Backend.PALLAS_TPU)
    bucket = Bucket(Phase(phase), num_tokens, num_rows)
    return step.define(PlainStep(bucket))


@pytest.mark.parametrize(
    "bucket",
    [
        {"phase": "decode", "num_tokens": 8, "num_rows": 8},
        {"phase": "mixed", "num_tokens": 64, "num_rows": 16},
    ],
    ids=["decode", "mixed"],
)
def test_step_compiles_for_v5e_with_the_pool_in_place(bucket):
    compiled = compile_for_tpu(
        "tests.kernels.test_tpu_step:build_step", options={**bucket, "num_layers": 2}
    )
    assert compiled.alias_bytes >= 2 * SLAB_BYTES, "both layers' pools are updated in place"
    assert compiled.temporary_bytes < SLAB_BYTES
    assert compiled.hlo.count("tpu_custom_call") == 4, "each layer writes, and decodes"
