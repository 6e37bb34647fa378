"""Every family against logits that Transformers made: chunked prefill and decode, batched."""

import json
import pathlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jpaged.engine import Engine
from jpaged_models import load_decoder
from jpaged_models.layers import rotary_for, rotate
from tests.helpers import (
    TOLERANCES,
    assert_close,
    compile_quickly,
    generated,
    make_engine,
    make_request,
    teacher_forced,
)
from tests.models.families import FAMILIES, seeded_checkpoint

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "families.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def family_engine(golden: dict[str, np.ndarray], family: str) -> Engine:
    shapes = json.loads(str(golden["about"]))["shapes"][family]
    checkpoint = seeded_checkpoint(family, {name: tuple(s) for name, s in shapes.items()})
    decoder = load_decoder(checkpoint, dtype=np.float32)
    return compile_quickly(make_engine(decoder, max_num_seqs=3, max_model_len=64))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    golden: dict[str, np.ndarray], family: str
):
    engine = family_engine(golden, family)
    keys = [f"{family}/{index}" for index in range(3)]
    requests = [
        make_request(golden[f"{key}/prompt"].tolist(), max_tokens=len(golden[f"{key}/tokens"]))
        for key in keys
    ]
    found = teacher_forced(engine, requests)
    for key, request, logits in zip(keys, requests, found, strict=True):
        # The goldens were chosen without near ties, so the tokens are equal, all of them.
        assert generated(request)[0] == golden[f"{key}/tokens"].tolist()
        assert_close(logits, golden[f"{key}/logits"], TOLERANCES["float32"].logits, key)


def test_goldens_cover_every_family_and_no_other(golden: dict[str, np.ndarray]):
    assert {key.partition("/")[0] for key in golden} == {*FAMILIES, "about"}


def test_a_wrong_shape_is_refused():
    rotary = rotary_for(jnp.arange(5), head_size=8, theta=1e4, scaling=None)
    assert rotate(jnp.ones((5, 3, 8)), rotary).shape == (5, 3, 8)
    with pytest.raises(jaxtyping.TypeCheckError):  # no axis of heads
        rotate(jnp.ones((5, 8)), rotary)
