"""Tolerances, tiny random models, and engines over them whose every logit can be seen."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from jpaged.bad_words import word_ids
from jpaged.config import EngineConfig
from jpaged.devices import first_device
from jpaged.engine import Engine
from jpaged.invariants import check
from jpaged.llm import LLM
from jpaged.loading import BuiltEngine, engine_for
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.planner import Planner
from jpaged.programs import Outputs, Program
from jpaged.requests import Request
from jpaged.requests import Sequence as TokenSequence
from jpaged.runner import Runner
from jpaged.scheduler import Scheduler
from jpaged.step import StepOutput
from jpaged_models import Decoder, ModelConfig, Tokenizer, random_decoder
from pallas_kernels import Backend


class Tolerance(NamedTuple):
    """How far two results may lie apart, as a share of the largest absolute value."""

    attention: float
    logits: float


TOLERANCES = {
    "float32": Tolerance(attention=2e-6, logits=1e-4),
    "bfloat16": Tolerance(attention=1e-2, logits=2e-2),
    "float16": Tolerance(attention=1.25e-3, logits=2.5e-3),  # three bits more than bfloat16
}
NEAR_TIE = 1e-3  # greedy tokens may differ where the top two logits lie closer
MAX_DIFFERING = 0.02  # and on no more than this share of sequences

ANY_KIND: dict[str, Any] = {  # a value of every kind that somebody may pass for another
    "none": None,
    "flag": True,
    "float": 1.5,
    "nan": math.nan,
    "text": "a",
    "texts": ["a"],
    "ints": [3],
    "dict": {3: 1.0},
    "bytes": b"a",
    "array": np.array([3]),
    "object": object(),
}

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


def assert_close(found: Any, expected: Any, tolerance: float, message: str = "") -> None:
    """Fails where the largest difference exceeds that share of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"{message}: {found.shape} is not {expected.shape}"
    assert np.isfinite(found).all(), f"{message}: not finite"
    error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    assert error <= tolerance, f"{message}: relative error {error:.2e} exceeds {tolerance:.0e}"


SMOLLM2: dict[str, Any] = {  # the shapes of the default model
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_size": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A two-layer Llama; sizes are all different."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 53,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_size": 16,
        "max_position_embeddings": 256,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "activation": "silu",
        "layer_windows": (None, None),
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**fields | changes)


def tiny_decoder(config: ModelConfig | None = None, *, seed: int = 0) -> Decoder:
    """A random decoder whose matrices are large enough that context decides the next token."""
    decoder = random_decoder(config or tiny_config(), dtype=np.float32, seed=seed)
    graph, state = nnx.split(decoder)
    state = jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim > 1 else leaf, state)
    return nnx.merge(graph, state)


def tiny_engine(**limits: Any) -> Engine:
    """An engine over a tiny random model that shares its programs with all others of its kind.

    `limits` replace those of LIMITS where the programs do not depend on them: none may be higher,
    and `block_size` stays. A lower `num_blocks` leaves part of the pool unused.
    """
    shared = _tiny_runner()
    config = dataclasses.replace(shared.config, **{"num_swap_blocks": 0} | limits)
    assert all(getattr(config, name) <= getattr(shared.config, name) for name in limits)
    assert config.block_size == LIMITS["block_size"]
    runner = copy.copy(shared)  # the programs and the parameters are the same objects
    runner.reset()
    return Engine(Scheduler(config, eos_token_ids=runner.model.eos_token_ids), runner, None)


LLM_OPTIONS: dict[str, Any] = {  # of an LLM over the tiny model's directory
    "block_size": 8,
    "num_blocks": 41,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "warm_up": False,
}

LIMITS: dict[str, Any] = {
    "block_size": 8,
    "num_blocks": 60,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_model_len": 96,
    "enable_prefix_caching": True,
}


def make_engine(decoder: Decoder, *, backend: Backend = Backend.XLA, **limits: Any) -> Engine:
    """An engine with a float32 pool on the first device; nothing is compiled yet.

    It has one program for decode steps and one for all others.
    """
    engine = engine_for(
        decoder,
        None,
        EngineConfig(**LIMITS | limits),
        pool_dtype=np.float32,
        backend=backend,
        device=first_device(),
        memory_fraction=None,
    )
    buckets = engine.runner.buckets
    del buckets.decode[:-1], buckets.mixed[:-1]
    return engine


@functools.cache
def _tiny_runner() -> Runner:
    return compile_quickly(make_engine(tiny_decoder(seed=3), num_swap_blocks=40)).runner


def compile_quickly(engine: Engine) -> Engine:
    """The engine, whose programs will be compiled in half the time and run slowly.

    XLA's own passes stay as they are; LLVM's, which take most of the time, are left out.
    """
    runner = engine.runner

    def compile_program(program: Program) -> jax.stages.Compiled:
        return runner.step.lower(program).compile({"xla_backend_optimization_level": "0"})

    runner.compile = compile_program
    return engine


def llm_over(engine: Engine, tokenizer: Tokenizer | None = None) -> LLM:
    """An LLM that found this engine already built. Never close one over a `tiny_engine`."""
    engine.tokenizer = tokenizer
    built = BuiltEngine(engine, "a tiny random model")
    with mock.patch("jpaged.llm.build_engine", return_value=built):
        return LLM(warm_up=False)


def start_without_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on sequences start in the last free block, so that some are soon preempted."""
    monkeypatch.setattr(Planner, "_num_free_to_start", property(lambda self: self.pool.num_free))


_request_ids = itertools.count()


def make_request(
    prompt: Sequence[int], params: SamplingParams = GREEDY, *, seed: int = 1, **changes: Any
) -> Request:
    """A request of token ids; `changes` are fields of `params` to replace."""
    params = dataclasses.replace(params, **changes)
    return Request(
        request_id=f"r{next(_request_ids)}",
        prompt=None,
        prompt_token_ids=list(prompt),
        params=params,
        seed=seed,
        bad_word_ids=word_ids(params.bad_words, None),
    )


def make_prompt(length: int, *, seed: int = 0, vocab_size: int = 53) -> list[int]:
    """Token ids that depend on the seed, none of them the tiny models' end of sequence."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, vocab_size, length).tolist()


def run_to_end(engine: Engine, requests: Sequence[Request] = (), most: int = 3000) -> None:
    """Adds the requests, steps until nothing is left, and checks every invariant on the way."""
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(most):
        if not engine.scheduler.has_work:
            return
        engine.step()
        check(engine.scheduler)
    raise AssertionError(f"still {len(engine.scheduler.requests)} requests after {most} steps")


def generated(request: Request) -> list[list[int]]:
    """The token ids of each of the request's sequences."""
    return [sequence.output_token_ids for sequence in request.sequences]


Record = Callable[[TokenSequence, int, np.ndarray], None]


def record_logits(engine: Engine, record: Record) -> None:
    """From now on every step reports its logits: `record(sequence, start, logits)`.

    `logits` is `[num_tokens, V]`, of the sequence's tokens from position `start` on. The variant
    of the step that returns them is the one that the tests alone compile.
    """
    run = engine.runner.run

    def run_recording(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        assert outputs is Outputs.TOKENS, "record requests without logprobs"
        out = run(plan, Outputs.LOGITS)
        logits, start = np.asarray(out.logits), 0
        for row in plan.rows:
            record(row.sequence, row.start, logits[start : start + row.num_tokens])
            start += row.num_tokens
        return out

    engine.runner.run = run_recording


def teacher_forced(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
    """Runs the requests; the logits after every token of each one's first sequence, `[C, V]`."""
    found = []
    for request, seen in zip(requests, computed_logits(engine, requests), strict=True):
        assert sorted(seen) == list(range(request.sequences[0].num_tokens - 1))
        found.append(np.stack([seen[position] for position in range(len(seen))]))
    return found


def computed_logits(engine: Engine, requests: Sequence[Request]) -> list[dict[int, np.ndarray]]:
    """Runs the requests; the logits at the positions of each one's first sequence, by position.

    What was found in the cache is missing. Of a position that was computed twice, after a
    preemption, both must agree.
    """
    V = engine.runner.model.vocab_size
    rows: dict[TokenSequence, dict[int, np.ndarray]] = {r.sequences[0]: {} for r in requests}

    def record(sequence: TokenSequence, start: int, logits: np.ndarray) -> None:
        assert logits.shape[1] == V
        for position, row in enumerate(logits, start):
            if position in rows[sequence]:
                before = rows[sequence][position]
                assert_close(row, before, TOLERANCES["float32"].logits, "computed again")
            rows[sequence][position] = row

    run = engine.runner.run
    record_logits(engine, record)
    run_to_end(engine, requests)
    engine.runner.run = run
    return list(rows.values())


def assert_greedy_tokens_agree(
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
) -> None:
    """Fails where tokens differ but for near ties, on few sequences, each of them printed.

    Args:
        found: tokens of each sequence.
        expected: the same, from the other side.
        margins: between the two largest logits, at each expected token.
    """
    differing = 0
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if list(ours) == list(theirs):
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        assert first < min(len(ours), len(theirs)), f"sequence {index}: one ends at {first}"
        margin = margins[index][first]
        print(f"sequence {index} differs at its token {first}: top two logits {margin:.1e} apart")
        assert margin < NEAR_TIE, f"sequence {index} differs at {first}, margin {margin:.2e}"
        differing += 1
    assert differing <= MAX_DIFFERING * len(found), f"{differing} of {len(found)} sequences differ"
