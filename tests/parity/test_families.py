"""Every family against Transformers live: longer prompts than the goldens', and decoding."""

import numpy as np
import pytest

from jpaged_models import load_decoder
from tests.helpers import (
    TOLERANCES,
    assert_close,
    assert_greedy_tokens_agree,
    generated,
    make_engine,
    make_request,
    teacher_forced,
)
from tests.models.families import FAMILIES, VOCAB_SIZE, seeded_checkpoint

pytestmark = pytest.mark.parity
transformers_side = pytest.importorskip(
    "tests.parity.transformers_side", reason="needs torch and transformers (make test-parity)"
)
LENGTHS = (1, 2, 8, 15, 16, 17, 40, 90, 200)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(family: str):
    model = transformers_side.family_model(family)
    checkpoint = seeded_checkpoint(family, transformers_side.tensor_shapes(model))
    engine = make_engine(
        load_decoder(checkpoint, dtype=np.float32),
        max_num_seqs=5,
        max_num_batched_tokens=48,
        max_model_len=256,
        num_blocks=40,  # the longest sequence needs 27
    )
    prompts = [
        np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS
    ]
    expected = [transformers_side.greedy(model, prompt, 14) for prompt in prompts]
    requests = [make_request(prompt, max_tokens=14) for prompt in prompts]
    found = teacher_forced(engine, requests)
    assert_greedy_tokens_agree(
        [generated(request)[0] for request in requests],
        [greedy.tokens for greedy in expected],
        [greedy.margins for greedy in expected],
    )
    for request, logits, greedy in zip(requests, found, expected, strict=True):
        if generated(request)[0] == greedy.tokens:
            assert_close(logits, greedy.logits, TOLERANCES["float32"].logits, family)
