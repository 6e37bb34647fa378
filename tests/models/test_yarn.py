"""yarn RoPE scaling, against what Transformers 5.23 makes of the same config.json."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged_models import config_from_hf
from jpaged_models.layers import rotary_for
from tests.models.tiny_files import LLAMA_CONFIG

# rope_parameters, head size and context; then `ROPE_INIT_FUNCTIONS["yarn"]`: radians, and a factor.
CASES: list[tuple[dict[str, Any], int, int, list[float], float]] = [
    (
        {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        16,
        131072,
        [1.0, 0.1778279, 0.03162278, 0.00421756, 0.0005, 4.445699e-05, 7.905694e-06, 1.405853e-06],
        1.138629436111989,
    ),
    (
        {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 128}
        | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        24,
        4096,
        [
            *(1.0, 0.252156, 0.0496034, 0.002152255, 0.0005881474, 0.0002178439),
            *(8.068715e-05, 2.988571e-05, 1.106936e-05, 4.099978e-06, 1.518591e-06, 5.624703e-07),
        ],
        1.3465735902799727,
    ),
    (
        {"rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 1024}
        | {"beta_fast": 16.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        16,
        4096,
        [1.0, 0.3162278, 0.1, 0.02134538, 0.0035, 7.905695e-05, 2.5e-05, 7.905694e-06],
        1.0857263992561355,
    ),
    (
        {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512}
        | {"attention_factor": 1.25},
        16,
        4096,
        [1.0, 0.2470529, 0.05625, 0.01087033, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
        1.25,
    ),
]


@pytest.mark.parametrize(("rope", "head_size", "context", "radians", "factor"), CASES)
def test_turns_and_their_factor_are_transformers(
    rope: dict[str, Any], head_size: int, context: int, radians: list[float], factor: float
):
    change = {"head_dim": head_size, "max_position_embeddings": context}
    config = config_from_hf(
        LLAMA_CONFIG | change | {"rope_parameters": {"rope_type": "yarn"} | rope}
    )
    positions = np.array([0, 1, 7, 100], np.int32)
    rotary = rotary_for(
        jnp.asarray(positions),
        head_size=head_size,
        theta=config.rope_theta or 0.0,
        scaling=config.rope_scaling,
    )
    angles = np.outer(positions, radians)
    np.testing.assert_allclose(rotary.cos, np.cos(angles) * factor, rtol=0, atol=2e-5)
    np.testing.assert_allclose(rotary.sin, np.sin(angles) * factor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("rope", "positions", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}, 24, 96),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}, 96, 96),
        ({"rope_type": "yarn", "factor": 2.5}, 24, 60),
        ({"rope_type": "linear", "factor": 4.0}, 96, 96),
        (None, 96, 96),
    ],
)
def test_the_context_is_what_yarn_stretches_it_to(rope: dict, positions: int, context: int):
    raw = LLAMA_CONFIG | {"max_position_embeddings": positions, "rope_scaling": rope}
    assert config_from_hf(raw).context_length == context


def test_a_factor_that_is_not_given_is_the_ratio_of_the_contexts():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 24}
    scaling = config_from_hf(LLAMA_CONFIG | {"rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert scaling.factor == 96 / 24
