"""What a step costs, in counts that no machine's noise can change."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine as engine_module
from jpaged.buckets import Bucket
from jpaged.config import EngineConfig
from jpaged.params import SamplingParams
from jpaged.programs import PlainStep, Prepare, Program, ReadBlocks, WriteBlocks
from jpaged.step import Step
from jpaged_models import Phase, abstract_decoder
from pallas_kernels import Backend, default_backend
from tests.helpers import SMOLLM2, llm_over, make_prompt, tiny_config, tiny_engine

BUCKETS = [Bucket(Phase.DECODE, 8, 8), Bucket(Phase.MIXED, 64, 8)]


class Cost(NamedTuple):
    """What XLA says of a compiled step."""

    flops: float
    bytes_accessed: float
    temp_bytes: int


def cost(num_layers: int, bucket: Bucket, backend: Backend) -> Cost:
    """Of a step with so many of SmolLM2's layers."""
    windows = (None,) * num_layers
    config = tiny_config(**SMOLLM2, num_layers=num_layers, layer_windows=windows)
    limits = EngineConfig(
        block_size=16,
        num_blocks=17,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
    )
    decoder = abstract_decoder(config, dtype=jnp.float32)
    step = Step(decoder, limits, pool_dtype=jnp.float32, backend=backend)
    compiled = step.lower(PlainStep(bucket)).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert analysis is not None
    assert memory is not None
    return Cost(analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes)


@pytest.mark.parametrize("bucket", BUCKETS, ids=["decode", "mixed"])
@pytest.mark.parametrize("backend", sorted({Backend.XLA.value, default_backend().value}))
def test_a_layer_reads_its_weights_once_and_keeps_nothing(backend: str, bucket: Bucket):
    one, two = (cost(num_layers, bucket, Backend(backend)) for num_layers in (1, 2))
    num_weights = 576 * (9 + 2 * 3) * 64 + 9 * 64 * 576 + 3 * 576 * 1536
    # A tile of the softmax that walks in XLA is a few per cent of the products.
    assert 1 < (two.flops - one.flops) / (2 * bucket.num_tokens * num_weights) < 1.12
    # Beside them the pool, which a scatter is said to read whole, and the activations.
    most = 12e6 if bucket.phase is Phase.DECODE else 28e6
    assert (two.bytes_accessed - one.bytes_accessed) < 4 * num_weights + most
    assert two.temp_bytes - one.temp_bytes < 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "program", [*map(PlainStep, BUCKETS), Prepare(), ReadBlocks(), WriteBlocks()], ids=str
)
def test_no_program_makes_a_second_pool(program: Program, dtype: str):
    backend = default_backend("cpu")
    if backend is Backend.XLA and dtype == "bfloat16":
        pytest.skip("XLA's scatter converts it, so that no engine has such a pool")
    config = tiny_config(**SMOLLM2, num_layers=1, layer_windows=(None,))
    limits = EngineConfig(
        block_size=16,
        num_blocks=12_000,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        num_swap_blocks=8,
    )
    decoder = abstract_decoder(config, dtype=dtype)
    step = Step(decoder, limits, pool_dtype=dtype, backend=backend)
    memory = step.compile(program).memory_analysis()
    assert memory is not None
    pool_bytes = 12_000 * 3 * 16 * 2 * 64 * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < pool_bytes // 5
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept < pool_bytes // 5


def test_a_step_is_one_call_with_one_transfer_each_way(monkeypatch: pytest.MonkeyPatch):
    llm = llm_over(tiny_engine())
    prompts = [make_prompt(length, seed=length) for length in (11, 3, 26)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)  # compiles; no two prompts share a block
    llm.reset_prefix_cache()
    runner, sent = llm.engine.runner, []
    num_leaves = len(jax.tree.leaves((runner.params, runner.pool, runner.state)))

    class Watched:
        """A program that notes what it is called with."""

        def __init__(self, program: jax.stages.Compiled) -> None:
            self.program = program

        def __call__(self, *arguments: Any) -> Any:
            leaves = jax.tree.leaves(arguments)
            assert len(leaves) == num_leaves + 1
            sent.append([leaf for leaf in leaves if not isinstance(leaf, jax.Array)])
            return self.program(*arguments)

    fetched: list[tuple[str, int]] = []
    as_array = np.asarray

    def watched_asarray(value: Any, *arguments: Any, **options: Any) -> np.ndarray:
        if isinstance(value, jax.Array):
            fetched.append((str(value.dtype), value.size))
        return as_array(value, *arguments, **options)

    programs = {name: Watched(program) for name, program in runner.programs.items()}
    monkeypatch.setattr(runner, "programs", programs)
    monkeypatch.setattr(engine_module.np, "asarray", watched_asarray)
    before = llm.stats().steps
    llm.generate(prompts, params, use_tqdm=False)
    num_steps = llm.stats().steps - before
    assert num_steps > 9
    assert [[leaf.dtype for leaf in leaves] for leaves in sent] == [[np.int32]] * num_steps
    assert len(fetched) == num_steps
    assert {dtype for dtype, _ in fetched} == {"int32"}
    assert max(size for _, size in fetched) <= runner.config.max_num_seqs
