"""The page of the API has every public name, and none that is not."""

import re

import pytest

import jpaged
import jpaged_models
import pallas_kernels
from tests.docs.markdown import ROOT

PUBLIC = [
    *(("jpaged", name) for name in jpaged.__all__),
    *(("pallas_kernels", name) for name in pallas_kernels.__all__),
]
# What users of parameters and checkpoints need; the rest of that package is the engine's.
OF_MODELS = {"load_decoder", "open_checkpoint", "params_of", "random_decoder", "save_checkpoint"}
OF_MODELS |= {"ModelConfig", "Tokenizer"}
OF_TRAINING = {"TrainConfig", "train", "held_out_loss", "HeldOut", "tiny_config"}
OF_TRAINING |= {"train_tokenizer", "dense_logits"}
SHOWN = [
    tuple(found)
    for found in re.findall(
        r"^::: (\w+)\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_is_shown(package: str, name: str):
    assert (package, name) in SHOWN


def test_nothing_else_is_shown():
    of_models = {("jpaged_models", name) for name in OF_MODELS | OF_TRAINING}
    assert set(SHOWN) == {*PUBLIC, *of_models}
    assert set(jpaged_models.__all__) >= OF_MODELS
    assert len(SHOWN) == len(set(SHOWN))
