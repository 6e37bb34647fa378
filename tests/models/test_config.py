"""A config.json of either spelling becomes the same ModelConfig."""

import contextlib
import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged_models.config import ARCHITECTURES, config_from_hf
from jpaged_models.rope import RopeScaling
from tests.models.tiny_files import LLAMA_CONFIG

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 64,
}


def test_both_spellings_of_rope_and_dtype_mean_the_same():
    older = LLAMA_CONFIG | {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "torch_dtype": "bfloat16",
    }
    newer = LLAMA_CONFIG | {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        "dtype": "bfloat16",
    }
    config = config_from_hf(older)
    assert config == config_from_hf(newer)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="llama3", **LLAMA3)
    assert config.dtype == "bfloat16"


def test_oldest_spelling_of_linear_scaling_is_read():
    raw = LLAMA_CONFIG | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert config_from_hf(raw).rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_default_rope_type_is_no_scaling():
    raw = LLAMA_CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = config_from_hf(raw)
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


def test_head_size_need_not_be_width_over_heads():
    config = config_from_hf(LLAMA_CONFIG | {"head_dim": 10})
    assert (config.head_size, config.num_heads, config.hidden_size) == (10, 3, 24)
    assert config.group_size == 3


def test_null_head_dim_and_kv_heads_are_the_plain_ones():
    raw = LLAMA_CONFIG | {"head_dim": None, "num_key_value_heads": None, "model_type": "qwen3"}
    config = config_from_hf(raw | {"architectures": ["Qwen3ForCausalLM"]})
    assert (config.head_size, config.num_kv_heads) == (8, 3)


@pytest.mark.parametrize(
    ("architecture", "extra", "flags"),
    [
        ("LlamaForCausalLM", {}, (False, False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False, False)),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True, False)),
        ("MistralForCausalLM", {"attention_bias": True}, (False, False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_follow_the_architecture(architecture, extra, flags):
    config = config_from_hf(LLAMA_CONFIG | {"architectures": [architecture], **extra})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == flags


@pytest.mark.parametrize(
    ("architecture", "extra", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 7}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 7}, (7,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 1}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True},
            (None, 7, 7, 7),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (7, None, 7, None),
        ),
    ],
)
def test_layer_windows_follow_the_architecture(architecture, extra, windows):
    raw = LLAMA_CONFIG | {"architectures": [architecture], "num_hidden_layers": 4, **extra}
    assert config_from_hf(raw).layer_windows == windows


def test_gpt2_keys_are_its_own():
    raw = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48}
    config = config_from_hf(raw | {"vocab_size": 31})
    assert config.architecture == "GPT2LMHeadModel"
    assert (config.hidden_size, config.intermediate_size, config.head_size) == (24, 96, 8)
    assert (config.num_layers, config.num_kv_heads, config.max_position_embeddings) == (2, 3, 48)
    assert config.rope_theta is None
    assert config.activation == "gelu_tanh"
    assert config.tie_word_embeddings
    assert config.qkv_bias
    assert (config.bos_token_id, config.eos_token_ids) == (50256, (50256,))


def test_end_ids_of_both_files_are_joined_without_repeats():
    raw = LLAMA_CONFIG | {"eos_token_id": [7, 5]}
    assert config_from_hf(raw, {"eos_token_id": [5, 9]}).eos_token_ids == (5, 9, 7)
    assert config_from_hf(raw, {"eos_token_id": 3}).eos_token_ids == (3, 7, 5)
    assert config_from_hf(raw | {"eos_token_id": None}).eos_token_ids == ()
    assert config_from_hf(LLAMA_CONFIG).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", *ARCHITECTURES.values()]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "linear", "llama3", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 40.0}}, ["32.0", "40.0"]),
        ({"hidden_act": "mish"}, ["mish", "silu", "gelu_new"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "bfloat16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "GGUF"]),
        ({"quantization_config": "gptq"}, ["quantization_config", "object", "'gptq'"]),
        ({"hidden_size": "24"}, ["hidden_size", "'24'"]),
        ({"eos_token_id": [2, "</s>"]}, ["eos_token_id", "'</s>'"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["num_kv_heads", "3", "2"]),
        ({"num_hidden_layers": 0}, ["num_layers", "0"]),
        ({"head_dim": 7}, ["head_size", "7"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 5.0}}, ["5.0", "4.5"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as refusal:
        config_from_hf(LLAMA_CONFIG | change)
    for word in words:
        assert word in str(refusal.value)


KEYS = (
    *("architectures", "model_type", "dtype", "torch_dtype", "quantization_config"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "factor", "type"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("bos_token_id", "eos_token_id"),
    *("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "layer_norm_epsilon"),
    *("activation_function", "scale_attn_weights"),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES.values())),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    generation=st.dictionaries(st.just("eos_token_id"), VALUES),
)
def test_values_of_any_type_are_read_or_refused_in_words(architecture, changes, generation):
    raw = LLAMA_CONFIG | {"architectures": [architecture]} | changes
    with contextlib.suppress(ValueError):
        config_from_hf(raw, generation)


def test_gpt2_with_another_attention_scale_is_refused():
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        config_from_hf({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True})


def test_windows_must_cover_every_layer():
    config = config_from_hf(LLAMA_CONFIG)
    with pytest.raises(ValueError, match="each of 2 layers, got 3"):
        dataclasses.replace(config, layer_windows=(None, None, None))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # Transformers' own
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_an_empty_config_has_the_defaults_of_transformers(model_type):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    theirs = transformers.AutoConfig.for_model(model_type)
    config = config_from_hf({"model_type": model_type})
    assert config.architecture == ARCHITECTURES[model_type]
    assert config == config_from_hf({**theirs.to_dict(), "dtype": "float32"})
    assert config.hidden_size == theirs.hidden_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_kv_heads == getattr(theirs, "num_key_value_heads", config.num_heads)
    assert config.max_position_embeddings == theirs.max_position_embeddings
