"""Every family's logits against those that Transformers gave, committed beside this file."""

import numpy as np
import pytest

from jpaged_models import load_decoder, open_checkpoint
from tests.helpers import TOLERANCES, assert_close, make_engine, make_request, teacher_forced
from tests.models.families import FAMILIES, Golden, load_golden, write_model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_position_are_those_of_transformers(name, tmp_path):
    golden = load_golden(name)
    for found, expected in zip(engine_logits(golden, tmp_path), golden.logits, strict=True):
        assert_close(found, expected, TOLERANCES["float32"].logits, name)


def engine_logits(golden: Golden, directory) -> list[np.ndarray]:
    """The paged engine's logits of each prompt, all batched together, in chunks."""
    write_model(directory, golden.config, golden.shapes)
    checkpoint = open_checkpoint(directory)
    engine = make_engine(load_decoder(checkpoint, dtype=np.float32))
    checkpoint.close()
    requests = [make_request(prompt, max_tokens=1) for prompt in golden.prompts]
    return teacher_forced(engine, requests)
