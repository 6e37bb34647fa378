"""The step as a program: compiled beforehand, in place, and fed by its own tokens."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.batch import FROM_DEVICE, batch_spec, pack_batch, unpack
from jpaged.buckets import Bucket, Buckets
from jpaged.config import EngineConfig
from jpaged.engine import Engine
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.programs import Outputs, PlainStep, Prepare
from jpaged.scheduler import Scheduler
from jpaged.step import Step, StepOutput
from jpaged_models import Phase, abstract_decoder
from pallas_kernels import Backend, default_backend
from tests.helpers import (
    SMOLLM2,
    generated,
    llm_over,
    make_engine,
    make_prompt,
    make_request,
    run_to_end,
    tiny_config,
    tiny_decoder,
    tiny_engine,
)

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
NUM_BLOCKS = 3000  # so that a layer's slab is larger than all that a step needs beside it
DEFAULT_LIMITS = {
    "cpu": {"max_num_seqs": 64, "max_num_batched_tokens": 256},
    "accelerator": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
}


class WarmEngine(NamedTuple):
    """An engine with its whole ladder compiled, and what JAX says about its compiling since."""

    engine: Engine
    events: list[str]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmEngine]:
    events: list[str] = []
    # A program from the persistent cache is not compiled, and knows less about its memory.
    was_enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)

    # Other events have negative durations too: the time that a cache saved.
    def listen(event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG001
        events.append(event)

    engine = make_engine(tiny_decoder(), num_blocks=NUM_BLOCKS)
    engine.runner.buckets = Buckets(max_num_seqs=4, max_num_batched_tokens=16)
    jax.monitoring.register_event_duration_secs_listener(listen)
    engine.runner.warm_up()
    assert len(engine.runner.buckets.all) == 3
    assert events.count(COMPILE_EVENT) == engine.runner.num_programs == 4
    events.clear()
    yield WarmEngine(engine, events)
    jax.monitoring.unregister_event_duration_listener(listen)
    jax.config.update("jax_enable_compilation_cache", was_enabled)


def test_a_mixed_workload_compiles_nothing_after_warm_up(warm: WarmEngine):
    engine = warm.engine
    # So few blocks are handed out that sequences are preempted too.
    config = dataclasses.replace(engine.runner.config, num_blocks=9)
    engine.scheduler = Scheduler(config, eos_token_ids=engine.runner.model.eos_token_ids)
    llm = llm_over(engine)
    before = llm.stats()
    warm.events.clear()
    kinds = [
        SamplingParams(temperature=0, max_tokens=33, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=5, seed=1, max_tokens=9, n=2),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.01, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, min_tokens=4, stop_token_ids=[7, 9], max_tokens=8),
    ]
    prompts = [make_prompt(1 + 11 * i % 23, seed=i) for i in range(9)]
    llm.generate(prompts, [kinds[i % 4] for i in range(9)])
    for _ in llm.stream(prompts[3], kinds[2]):
        break  # a stream that is closed early
    request_id = llm.submit(prompts[5], kinds[0])
    llm.step()
    llm.abort(request_id)
    after = llm.stats()
    assert after.preemptions > 0
    assert after.steps > 40
    assert warm.events.count(COMPILE_EVENT) == 0
    assert (after.compiles, after.lazy_compiles) == (before.compiles, 0)


def test_pool_and_state_are_updated_in_place_and_no_temporary_is_a_layers_slab(warm: WarmEngine):
    runner = warm.engine.runner
    slab = runner.pool[0].nbytes
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves((runner.pool, runner.state)))
    assert slab > 2**23
    common = [*map(PlainStep, runner.buckets.all), Prepare()]
    assert set(common) <= set(runner.programs)
    for program in common:
        analysis = runner.programs[program].memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes == donated, program
        assert analysis.temp_size_in_bytes < slab, program
        # All that comes out beside them is a token a row.
        assert analysis.output_size_in_bytes - donated < 1024, program


@pytest.mark.parametrize("backend", sorted({Backend.XLA.value, default_backend().value}))
def test_at_the_default_models_shapes_a_step_needs_little_beside_the_pool(backend: str):
    """Beside the sampler's copies of the logits there is next to nothing."""
    config = tiny_config(**SMOLLM2, num_layers=2, layer_windows=(None, None))
    decoder = abstract_decoder(config, dtype=jnp.float32)
    limits = EngineConfig(
        block_size=16,
        num_blocks=2913,  # of the 2 GiB that a CPU's pool has at most
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_model_len=8192,
    )
    step = Step(decoder, limits, pool_dtype=jnp.float32, backend=Backend(backend))
    slab = 2913 * 3 * 16 * 128 * 4
    for bucket in (Bucket(Phase.DECODE, 16, 16), Bucket(Phase.MIXED, 256, 64)):
        analysis = step.lower(PlainStep(bucket)).compile().memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes >= 2 * slab
        logits = bucket.num_rows * config.vocab_size * 4
        assert analysis.temp_size_in_bytes < 6.1 * logits, bucket
        assert 2 * logits < slab  # so none of those copies is nearly as large as a slab


def test_the_pool_that_went_in_is_gone_and_there_is_one_live_copy(warm: WarmEngine):
    engine = warm.engine
    engine.step()  # finds that nobody waits for what is still in flight
    live_bytes = sum(leaf.nbytes for leaf in jax.live_arrays())
    pool, state = engine.runner.pool, engine.runner.state
    run_to_end(engine, [make_request(make_prompt(12))])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((pool, state)))
    del pool, state
    assert sum(leaf.nbytes for leaf in jax.live_arrays()) == live_bytes


@pytest.mark.parametrize("kind", DEFAULT_LIMITS)
def test_a_default_engine_has_at_most_twelve_programs(kind: str):
    buckets = Buckets(**DEFAULT_LIMITS[kind])
    assert len(buckets.all) == len(set(buckets.all)) <= 12 - 1  # and one that prepares steps


@pytest.mark.parametrize("limits", [(1, 1), (1, 300), (300, 1), (64, 256), (7, 5), (256, 2048)])
def test_every_plan_within_the_limits_fits_a_bucket(limits: tuple[int, int]):
    max_num_seqs, max_num_batched_tokens = limits
    buckets = Buckets(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    max_rows = min(limits)
    for num_decodes in {1, max_rows // 2, max_rows}:
        for num_tokens in {num_decodes, num_decodes + 2, max_num_batched_tokens}:
            is_decode = num_tokens == num_decodes
            num_rows = num_decodes + (not is_decode)
            if num_tokens > max_num_batched_tokens or num_rows > max_rows or num_decodes == 0:
                continue
            rows = (None,) * num_rows  # only counted
            bucket = buckets.fit(StepPlan(rows, num_tokens, num_decodes, (), ()))  # pyright: ignore[reportArgumentType]
            assert bucket.num_tokens >= num_tokens
            assert bucket.num_rows >= num_rows


def test_sampled_tokens_are_fed_back_on_the_device():
    requests = [make_request(make_prompt(n, seed=n), max_tokens=9) for n in (5, 3)]
    run_to_end(tiny_engine(), requests)
    engine = tiny_engine()
    again = [make_request(r.prompt_token_ids, max_tokens=9) for r in requests]
    run, num_fed_back = engine.runner.run, 0

    def run_and_forget(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        nonlocal num_fed_back
        bucket = engine.runner.buckets.fit(plan)
        packed = pack_batch(plan, bucket, [], block_size=8, padding_row=4, eos_token_ids=())
        tokens = np.asarray(unpack(jnp.asarray(packed), batch_spec(bucket, 8)).tokens)
        for row in plan.rows:
            generates = row.start >= row.sequence.num_prompt_tokens
            assert row.feeds_back == generates
            if row.feeds_back:
                # Nothing that the host believes of this token can matter to the step.
                assert tokens[plan.rows.index(row)] == FROM_DEVICE
                last, row.sequence.token_ids[-1] = row.sequence.token_ids[-1], 0
                restore.append((row.sequence, last))
                num_fed_back += 1
        out = run(plan, outputs)
        while restore:
            sequence, last = restore.pop()
            sequence.token_ids[-1] = last
        return out

    restore: list = []
    engine.runner.run = run_and_forget
    run_to_end(engine, again)
    assert num_fed_back == 2 * 8
    assert [generated(r) for r in again] == [generated(r) for r in requests]
