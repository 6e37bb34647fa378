"""What is accepted and refused as a parameter or a limit."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from jpaged.config import EngineConfig
from jpaged.params import SamplingParams
from tests.helpers import ANY_KIND

LIMITS: dict[str, Any] = {
    "block_size": 16,
    "num_blocks": 30,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 100,
}


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (
        1,
        1.0,
        1.0,
        0,
        0.0,
    )
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (
        16,
        0,
        None,
        None,
    )
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (
        0.0,
        0.0,
        1.0,
    )
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == (None, None, ())
    assert not params.greedy
    assert not params.shapes_logits


def test_values_are_stored_in_one_form():
    of_numpy: Any = {
        "stop_token_ids": np.array([3, 5]),
        "n": np.int32(2),
        "seed": np.uint64(2**64 - 1),
        "top_p": np.float32(0.5),
    }
    params = SamplingParams(stop="\n\n", top_k=-1, temperature=0, **of_numpy)
    assert params.stop == ("\n\n",)
    assert params.stop_token_ids == (3, 5)
    assert params.top_k == 0
    assert params.greedy
    assert (params.seed, params.top_p) == (2**64 - 1, 0.5)
    assert [type(v) for v in (params.n, params.seed, params.top_p)] == [int, int, float]
    assert type(params.temperature) is float
    assert SamplingParams(stop=["a", "bc"]).stop == ("a", "bc")
    assert dataclasses.replace(params, temperature=0.5).stop == ("\n\n",)


def test_what_bends_logits_is_stored_in_one_form_too():
    numpy_ids: Any = {"logit_bias": {np.int64(4): 3}, "allowed_token_ids": [4, np.int32(5)]}
    params = SamplingParams(bad_words=["no ", [3, 4]], **numpy_ids)
    assert params.logit_bias == {4: 3.0}
    assert params.allowed_token_ids == (4, 5)
    assert params.bad_words == ("no ", (3, 4))
    assert SamplingParams(bad_words="never").bad_words == ("never",)
    left_out: Any = {"stop": None, "stop_token_ids": None, "bad_words": None}
    assert SamplingParams(**left_out) == SamplingParams()
    assert SamplingParams(logit_bias={}).logit_bias is None
    again = dataclasses.replace(params)
    assert again == params
    assert hash(again) == hash(params)
    bending: dict[str, Any] = {
        "presence_penalty": -0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {3: 0.5},
        "allowed_token_ids": [3],
        "bad_words": [[3]],
    }
    for name, value in bending.items():
        assert SamplingParams(**{name: value}).shapes_logits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", -1),
        ("n", 16_385),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("temperature", 1e7),
        ("temperature", 10**400),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2**30 + 1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 101),
        ("logit_bias", {3: 101}),
        ("logit_bias", {3: -math.inf}),
        ("logit_bias", {-3: 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", ""),
        ("bad_words", ["a", "  "]),
        ("bad_words", [[]]),
        ("bad_words", [[3, -1]]),
        ("bad_words", ["a", "\ud800"]),
        ("best_of", 0),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", "b\udcff"]),
        ("cache_salt", "\udcff"),
        ("stop_token_ids", [-1]),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("min_tokens", 2**30 + 1),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})  # pyright: ignore[reportArgumentType]


TAKEN_KINDS = {  # of `ANY_KIND`, by those fields that take any
    "temperature": {"float"},
    "presence_penalty": {"float"},
    "frequency_penalty": {"float"},
    "repetition_penalty": {"float"},
    "logit_bias": {"none", "dict"},
    "allowed_token_ids": {"none", "ints", "array"},
    "bad_words": {"none", "text", "texts"},
    "best_of": {"none"},
    "seed": {"none"},
    "stop": {"none", "text", "texts"},
    "stop_token_ids": {"none", "ints", "array"},
    "max_tokens": {"none"},
    "logprobs": {"none"},
    "ignore_eos": {"flag"},
    "skip_special_tokens": {"flag"},
    "include_stop_str_in_output": {"flag"},
    "detokenize": {"flag"},
    "cache_salt": {"none", "text"},
}


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, kind: str):
    value: Any = ANY_KIND[kind]
    if kind in TAKEN_KINDS.get(name, ()):
        SamplingParams(**{name: value})
        return
    error = (TypeError, ValueError) if kind in ("nan", "float") else TypeError
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.0),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {3: "1"}),
        ("allowed_token_ids", ["3"]),
        ("bad_words", [3, 4]),
        ("bad_words", [["3"]]),
        ("stop", [3]),
        ("stop_token_ids", ["3"]),
        ("ignore_eos", 1),
        ("max_tokens", 4.0),
    ],
)
def test_a_value_of_nearly_the_right_type_is_refused_by_name(name: str, value: object):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})  # pyright: ignore[reportArgumentType]


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=3)  # pyright: ignore[reportCallIssue]


def test_stop_strings_without_text_are_refused():
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_every_seed_of_64_bits_is_taken_and_no_limit_of_tokens_too():
    for seed in (-(2**63), -1, 0, 2**64 - 1):
        assert SamplingParams(seed=seed).seed == seed
    assert SamplingParams(max_tokens=None, min_tokens=400).max_tokens is None


def test_engine_limits_derive_from_one_another():
    config = EngineConfig(**LIMITS)
    assert config.max_blocks_per_seq == 7  # 100 tokens in blocks of 16
    assert [config.blocks_for(count) for count in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize("block_size", [4, 12, 24, 256])
def test_a_block_size_that_is_no_power_of_two_in_range_is_refused(block_size: int):
    with pytest.raises(ValueError, match=f"power of two from 8 to 128, got {block_size}"):
        EngineConfig(**LIMITS | {"block_size": block_size})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", LIMITS)
def test_engine_limits_are_positive_ints(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        EngineConfig(**LIMITS | {name: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        EngineConfig(**LIMITS | {name: 2.0})  # pyright: ignore[reportArgumentType]


def test_best_of_draws_more_than_it_returns():
    params = SamplingParams(n=2, best_of=5)
    assert (params.num_sequences, params.ranks, params.num_logprobs) == (5, True, 0)
    assert SamplingParams(n=2, best_of=2).num_logprobs is None
    assert SamplingParams(n=2, best_of=5, logprobs=3).num_logprobs == 3
    with pytest.raises(ValueError, match="best_of must be at least n, got 2 < 3"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(best_of=2, temperature=0)
