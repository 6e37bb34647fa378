"""The default model against goldens of Transformers, under limits that cut and shuffle its work.

`tests/parity` runs every combination and more prompts, against Transformers itself.
"""

import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import baseline_model
from benchmarks.baseline import Baseline
from jpaged.engine import Engine
from jpaged.requests import Request, Sequence
from jpaged_models import Decoder, NamedTensors, Tokenizer
from pallas_kernels import Backend, default_backend
from tests.engine.prose import FEW_LENGTHS, TEXT, prompts_of
from tests.helpers import (
    NEAR_TIE,
    TOLERANCES,
    assert_greedy_tokens_agree,
    generated,
    make_engine,
    make_request,
    record_logits,
    run_to_end,
)

# The first is the smallest budget. The next two have pools so small that sequences are preempted,
# to be computed again or to come back from host memory. The last takes most prompts whole.
LIMITS = [
    {"block_size": 8, "max_num_batched_tokens": 16, "num_blocks": 100},
    {"block_size": 16, "max_num_batched_tokens": 64, "num_blocks": 25},
    {"block_size": 16, "max_num_batched_tokens": 64, "num_blocks": 25, "num_swap_blocks": 60},
    {"block_size": 32, "max_num_batched_tokens": 512, "num_blocks": 40},
]
# The default backend at all of them, `xla` at the middle ones; at the others where there is time.
CASES = [(default_backend().value, limits) for limits in LIMITS]
if default_backend() is not Backend.XLA:
    CASES += [(Backend.XLA.value, limits) for limits in LIMITS[1:3]]
    CASES += [
        pytest.param(Backend.XLA.value, limits, marks=pytest.mark.parity)
        for limits in (LIMITS[0], LIMITS[3])
    ]


@pytest.fixture(scope="module")
def golden(smollm2_golden: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(smollm2_golden) as arrays:
        return dict(arrays)


def golden_requests(golden: dict[str, np.ndarray], n: int = 1) -> list[Request]:
    lengths = [len(golden[f"{index}/tokens"]) for index in range(len(FEW_LENGTHS))]
    return [
        make_request(golden[f"{index}/prompt"].tolist(), max_tokens=length, n=n)
        for index, length in enumerate(lengths)
    ]


def test_the_golden_prompts_are_pieces_of_the_text(
    golden: dict[str, np.ndarray], smollm2_tokenizer: Tokenizer
):
    pieces = prompts_of(smollm2_tokenizer.encode(TEXT), FEW_LENGTHS)
    assert [golden[f"{i}/prompt"].tolist() for i in range(len(FEW_LENGTHS))] == pieces


@pytest.mark.parametrize(("backend", "limits"), CASES, ids=str)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    golden: dict[str, np.ndarray], smollm2_decoder: Decoder, backend: str, limits: dict[str, int]
):
    engine = make_engine(
        smollm2_decoder, backend=Backend(backend), max_num_seqs=7, max_model_len=300, **limits
    )
    requests = golden_requests(golden)
    watched = watch_logits(engine, requests, golden)
    run_to_end(engine, requests[::-1])  # the longest first, which takes most of the pool
    stats = engine.stats()
    assert (stats.preemptions > 0) == (limits["num_blocks"] == 25)
    assert (stats.swapped_in_blocks > 0) == ("num_swap_blocks" in limits)
    assert_golden_tokens(requests, golden)
    print(f"largest relative error of a logit: {max(watched.worst.values()):.1e}")
    assert max(watched.worst.values()) <= TOLERANCES["float32"].logits, watched.worst
    every = {i: set(range(r.sequences[0].num_tokens - 1)) for i, r in enumerate(requests)}
    assert watched.positions == every


def test_warm_and_forked_answers_equal_those_of_transformers(
    golden: dict[str, np.ndarray], smollm2_decoder: Decoder
):
    engine = make_engine(
        smollm2_decoder,
        backend=default_backend(),
        block_size=16,
        num_blocks=80,
        max_num_seqs=7,
        max_num_batched_tokens=64,
        max_model_len=300,
    )
    run_to_end(engine, golden_requests(golden))
    cold = engine.stats()
    warm, forked = golden_requests(golden), golden_requests(golden, n=3)
    worst = watch_logits(engine, warm, golden).worst
    run_to_end(engine, warm)
    assert engine.stats().hit_rate > cold.hit_rate
    assert_golden_tokens(warm, golden)
    assert max(worst.values()) <= TOLERANCES["float32"].logits, worst
    run_to_end(engine, forked)
    assert engine.stats().copied_blocks > 0
    assert_golden_tokens(forked, golden)


def test_the_unpaged_baseline_says_what_transformers_says(
    golden: dict[str, np.ndarray], smollm2_checkpoint: NamedTensors
):
    params = baseline_model.load_params(smollm2_checkpoint)
    baseline = Baseline(smollm2_checkpoint.config, params, num_rows=4, reserved=320)
    expected = [golden[f"{index}/tokens"].tolist() for index in range(len(FEW_LENGTHS))]
    prompts = [golden[f"{index}/prompt"].tolist() for index in range(len(FEW_LENGTHS))]
    found = baseline.generate(prompts, [len(tokens) for tokens in expected], ignore_eos=True)
    margins = [golden[f"{index}/margins"].tolist() for index in range(len(FEW_LENGTHS))]
    assert_greedy_tokens_agree(found, expected, margins)


def assert_golden_tokens(requests: list[Request], golden: dict[str, np.ndarray]) -> None:
    """Every sequence of every request says what Transformers said."""
    found = [(index, tokens) for index, r in enumerate(requests) for tokens in generated(r)]
    assert_greedy_tokens_agree(
        [tokens for _, tokens in found],
        [golden[f"{index}/tokens"].tolist() for index, _ in found],
        [golden[f"{index}/margins"].tolist() for index, _ in found],
    )


def test_no_golden_margin_is_a_near_tie(golden: dict[str, np.ndarray]):
    for index in range(len(FEW_LENGTHS)):
        assert golden[f"{index}/margins"].min() > NEAR_TIE


class Watched(NamedTuple):
    """Of each request, the largest error as a share of the largest logit, and where one looked."""

    worst: dict[int, float]
    positions: dict[int, set[int]]


def watch_logits(engine: Engine, requests: list[Request], golden: dict[str, np.ndarray]) -> Watched:
    """Watches the logits of each request's first sequence from now on."""
    numbers = {request.sequences[0]: index for index, request in enumerate(requests)}
    watched = Watched({}, {})

    def record(sequence: Sequence, start: int, logits: np.ndarray) -> None:
        index = numbers.get(sequence)
        if index is None:  # of a later run
            return
        rows = slice(start, start + len(logits))
        expected, largest = golden[f"{index}/logits"][rows], golden[f"{index}/largest"][rows]
        found = np.concatenate(
            [logits[:, golden["shown_ids"]], np.abs(logits).max(axis=-1)[:, None]], axis=1
        )
        expected = np.concatenate([expected, largest[:, None]], axis=1)
        error = np.max(np.abs(found - expected) / largest[:, None])
        watched.worst[index] = max(watched.worst.get(index, 0.0), float(error))
        watched.positions.setdefault(index, set()).update(range(start, start + len(logits)))

    record_logits(engine, record)
    return watched
