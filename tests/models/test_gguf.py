"""A GGUF file opens to Hugging Face's names, shapes and values, or says what is wrong."""

import dataclasses
import math

import gguf
import numpy as np
import pytest

from jpaged_models import config_from_hf
from jpaged_models.rope import RopeScaling
from jpaged_models.weights import open_named_tensors
from tests.models.tiny_files import (
    LLAMA_CONFIG,
    LLAMA_VALUES,
    D,
    F,
    H,
    L,
    N,
    V,
    add_value,
    as_gguf_tensors,
    assert_same,
    llama_tensors,
    write_directory,
    write_gguf,
)


def test_gguf_llama_gets_its_rows_of_q_and_k_back(tmp_path):
    biases = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    tensors = llama_tensors(biases=biases)
    stored = as_gguf_tensors(tensors)
    changed = {"attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"}
    for name, array in as_gguf_tensors(tensors, interleaved=False).items():
        is_changed = name.removeprefix("blk.0.").removeprefix("blk.1.") in changed
        assert np.array_equal(array, stored[name]) != is_changed, name
    opened = open_named_tensors(write_gguf(tmp_path / "m.gguf", "llama", LLAMA_VALUES, stored))
    assert_same(opened, tensors)
    assert (opened.config.qkv_bias, opened.config.output_bias) == (True, True)
    assert opened.config.dtype == "float32"


def test_gguf_llama_has_the_config_of_its_directory(tmp_path):
    tensors = llama_tensors()
    values = LLAMA_VALUES | {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    opened = open_named_tensors(
        write_gguf(tmp_path / "m.gguf", "llama", values, as_gguf_tensors(tensors))
    )
    directory = open_named_tensors(write_directory(tmp_path / "m", tensors))
    assert opened.config == directory.config


def test_gguf_with_its_own_head_is_untied(tmp_path):
    tensors = llama_tensors() | {"lm_head.weight": np.ones((V, D), np.float32)}
    opened = open_named_tensors(
        write_gguf(tmp_path / "m.gguf", "llama", LLAMA_VALUES, as_gguf_tensors(tensors))
    )
    assert_same(opened, tensors)
    assert not opened.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("architecture", "biases", "norms"),
    [
        ("qwen2", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False),
        ("qwen3", (), True),
    ],
)
def test_gguf_qwen_keeps_its_rows(tmp_path, architecture, biases, norms):
    tensors = llama_tensors(biases=biases)
    for layer in range(L if norms else 0):
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = np.ones(H, np.float32)
    values = {key: value for key, value in LLAMA_VALUES.items() if "dimension_count" not in key}
    values |= {".attention.key_length": H, ".attention.value_length": H, ".rope.freq_base": 1e6}
    stored = as_gguf_tensors(tensors, interleaved=False)
    opened = open_named_tensors(write_gguf(tmp_path / "m.gguf", architecture, values, stored))
    assert_same(opened, tensors)
    config = opened.config
    assert config.architecture == {"qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture] + "ForCausalLM"
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (bool(biases), False, norms)
    assert (config.head_size, config.rope_theta) == (H, 1e6)


def test_gguf_gpt2_gets_its_products_turned_round(tmp_path):
    shapes = {  # GGUF's name -> Hugging Face's, and its shape
        "token_embd.weight": ("transformer.wte.weight", (V, D)),
        "position_embd.weight": ("transformer.wpe.weight", (48, D)),
        "output_norm.weight": ("transformer.ln_f.weight", (D,)),
        "blk.0.attn_norm.bias": ("transformer.h.0.ln_1.bias", (D,)),
        "blk.0.attn_qkv.weight": ("transformer.h.0.attn.c_attn.weight", (D, 3 * D)),
        "blk.0.attn_qkv.bias": ("transformer.h.0.attn.c_attn.bias", (3 * D,)),
        "blk.0.attn_output.weight": ("transformer.h.0.attn.c_proj.weight", (D, D)),
        "blk.0.attn_output.bias": ("transformer.h.0.attn.c_proj.bias", (D,)),
        "blk.0.ffn_up.weight": ("transformer.h.0.mlp.c_fc.weight", (D, F)),
        "blk.0.ffn_up.bias": ("transformer.h.0.mlp.c_fc.bias", (F,)),
        "blk.0.ffn_down.weight": ("transformer.h.0.mlp.c_proj.weight", (F, D)),
    }
    rng = np.random.default_rng(1)
    stored, tensors = {}, {}
    for name, (full_name, shape) in shapes.items():
        tensors[full_name] = rng.standard_normal(shape).astype(np.float32)
        is_product = full_name.split(".")[-2].startswith("c_") and len(shape) == 2
        array = tensors[full_name].T if is_product else tensors[full_name]
        stored[name] = np.ascontiguousarray(array)
    values = {
        ".context_length": 48,
        ".embedding_length": D,
        ".feed_forward_length": F,
        ".block_count": 1,
        ".attention.head_count": N,
        ".attention.layer_norm_epsilon": 1e-5,
    }
    opened = open_named_tensors(write_gguf(tmp_path / "m.gguf", "gpt2", values, stored))
    assert_same(opened, tensors)
    config = opened.config
    assert (config.architecture, config.rope_theta) == ("GPT2LMHeadModel", None)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)
    assert (config.num_kv_heads, config.activation) == (N, "gelu_tanh")


def test_gguf_is_dequantised_and_half_precision_widened(tmp_path):
    tensors = {"model.embed_tokens.weight": (V, 64), "model.norm.weight": (64,)}
    rng = np.random.default_rng(2)
    arrays = {name: rng.standard_normal(shape).astype("f4") for name, shape in tensors.items()}
    values = LLAMA_VALUES | {".embedding_length": 64, ".attention.key_length": H}
    for kind, dtype, tolerance in [
        (gguf.GGMLQuantizationType.F32, "float32", 0.0),
        (gguf.GGMLQuantizationType.F16, "float16", 2e-3),
        (gguf.GGMLQuantizationType.BF16, "bfloat16", 2e-2),
        (gguf.GGMLQuantizationType.Q8_0, "bfloat16", 2e-2),
        (gguf.GGMLQuantizationType.Q4_1, "bfloat16", 3e-1),
    ]:
        path = tmp_path / f"{kind.name}.gguf"
        stored = as_gguf_tensors(arrays)
        opened = open_named_tensors(
            write_gguf(path, "llama", values, stored, kinds={"token_embd.weight": kind})
        )
        array = opened.tensor("model.embed_tokens.weight")
        assert (array.dtype, array.shape) == (np.float32, (V, 64))
        assert np.abs(array - arrays["model.embed_tokens.weight"]).max() <= tolerance
        assert opened.config.dtype == dtype


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_quantisation_that_gguf_dequantises_opens_and_others_are_named(tmp_path, kind):
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    zeros = np.zeros((V, type_size * (256 // block_size)), np.uint8)
    try:
        expected = gguf.dequantize(zeros, kind)
    except NotImplementedError:
        expected = None
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in (LLAMA_VALUES | {".embedding_length": 256}).items():
        add_value(writer, f"llama{key}", value)
    add_value(writer, "llama.attention.key_length", H)
    writer.add_tensor("token_embd.weight", zeros, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if expected is None:
        with pytest.raises(ValueError, match=f"quantisation {kind.name} is not supported"):
            open_named_tensors(tmp_path / "m.gguf")
        return
    array = open_named_tensors(tmp_path / "m.gguf").tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}, 4.0),
        ({".rope.scaling.factor": 4.0}, 4.0),
        ({".rope.scale_linear": 2.0}, 2.0),
        ({".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}, None),
        ({".rope.scaling.type": "linear", ".rope.scaling.factor": 1.0}, None),
    ],
)
def test_gguf_linear_rope_scaling_is_read(tmp_path, values, scaling):
    path = write_gguf(
        tmp_path / "m.gguf", "llama", LLAMA_VALUES | values, as_gguf_tensors(llama_tensors())
    )
    expected = None if scaling is None else RopeScaling(kind="linear", factor=scaling)
    assert open_named_tensors(path).config.rope_scaling == expected


@pytest.mark.parametrize(
    ("values", "published"),
    [
        ({}, {}),
        ({"original_context_length": 32}, {"original_max_position_embeddings": 32}),
        ({"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
        ({"yarn_log_multiplier": 0.7}, {"mscale": 1.0, "mscale_all_dim": 0.7}),
        (
            {"yarn_attn_factor": 2.0, "attn_factor": 1.5, "yarn_ext_factor": -1.0},
            {"attention_factor": 3.0 * (1 + 0.1 * math.log(4.0))},
        ),
    ],
)
def test_gguf_yarn_scaling_is_that_of_the_published_config(tmp_path, values, published):
    values = {f".rope.scaling.{name}": value for name, value in values.items()}
    values |= {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
    path = write_gguf(
        tmp_path / "m.gguf", "llama", LLAMA_VALUES | values, as_gguf_tensors(llama_tensors())
    )
    found = open_named_tensors(path).config
    rope = {"rope_type": "yarn", "factor": 4.0} | published
    raw = LLAMA_CONFIG | {"max_position_embeddings": found.max_position_embeddings}
    expected = config_from_hf(raw | {"rope_scaling": rope}).rope_scaling
    assert found.rope_scaling is not None
    assert expected is not None
    assert dataclasses.asdict(found.rope_scaling) == pytest.approx(dataclasses.asdict(expected))


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta"),
    [(8.0, 1.0, 4.0, 8192, 5e5), (32.0, 1.0, 4.0, 8192, 5e5), (4.0, 0.5, 3.0, 1024, 1e4)],
)
def test_gguf_table_of_llama3_factors_gives_its_parameters(
    tmp_path, factor, low, high, original, theta
):
    frequencies = theta ** (-np.arange(0, 64, 2) / 64)
    stored = as_gguf_tensors(llama_tensors())
    stored["rope_freqs.weight"] = converter_factors(frequencies, factor, low, high, original)
    values = LLAMA_VALUES | {".rope.freq_base": theta}
    values |= {".attention.key_length": 64, ".rope.dimension_count": 64}
    opened = open_named_tensors(write_gguf(tmp_path / "m.gguf", "llama", values, stored))
    found = opened.config.rope_scaling
    assert found is not None
    again = converter_factors(
        frequencies,
        found.factor,
        found.low_freq_factor,
        found.high_freq_factor,
        found.original_max_position_embeddings,
    )
    np.testing.assert_allclose(again, stored["rope_freqs.weight"], rtol=1e-3)
    assert (found.kind, found.factor) == ("llama3", factor)
    if low == 1.0:
        assert (found.high_freq_factor, found.original_max_position_embeddings) == (high, original)
    assert "rope_freqs.weight" not in opened.names()


def converter_factors(
    frequencies: np.ndarray, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What llama.cpp's converter writes for `rope_type: llama3`."""
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({".rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        (
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
            | {".rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor of 0.5 is not supported; it must be 1",
        ),
        ({".attention.value_length": 16}, "keys of 8 beside values of 16"),
        ({".rope.dimension_count": 4}, "RoPE over 4 of 8"),
        ({".expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "one of 3 parts.*--merge"),
        ({".attention.head_count_kv": [1, 3]}, r"head_count_kv must be one integer, got \[1, 3\]"),
        ({".block_count": None}, r"lacks the metadata llama\.block_count"),
        ({".attention.head_count_kv": 2}, "multiple of num_kv_heads, got 3 and 2"),
    ],
)
def test_gguf_metadata_that_is_not_supported_is_refused(tmp_path, change, words):
    values = {k: v for k, v in (LLAMA_VALUES | change).items() if v is not None}
    stored = as_gguf_tensors(llama_tensors())
    with pytest.raises(ValueError, match=words):
        open_named_tensors(write_gguf(tmp_path / "m.gguf", "llama", values, stored))


def test_gguf_of_another_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {"token_embd.weight": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"'mamba' is not supported.*llama, qwen2, qwen3, gpt2"):
        open_named_tensors(path)


def test_gguf_with_a_tensor_of_no_place_or_without_weights_is_refused(tmp_path):
    stored = as_gguf_tensors(llama_tensors())
    odd = stored | {"blk.0.post_ffw_norm.weight": np.ones(D, np.float32)}
    with pytest.raises(ValueError, match=r"'blk\.0\.post_ffw_norm\.weight' has no place"):
        open_named_tensors(write_gguf(tmp_path / "odd.gguf", "llama", LLAMA_VALUES, odd))
    del stored["token_embd.weight"]
    with pytest.raises(ValueError, match="no model weights"):
        open_named_tensors(write_gguf(tmp_path / "m.gguf", "llama", LLAMA_VALUES, stored))


def test_gguf_cut_anywhere_is_refused(tmp_path):
    values = LLAMA_VALUES | {"tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5]}
    whole = write_gguf(tmp_path / "m.gguf", "llama", values, as_gguf_tensors(llama_tensors()))
    data = whole.read_bytes()
    # The writer pads the file's end, so the last cut is a whole alignment.
    for length in [*range(0, 700, 7), len(data) // 2, len(data) - 33]:
        whole.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"download it again"):
            open_named_tensors(whole)


@pytest.mark.parametrize(
    "data",
    [
        b"not a model at all, but long enough to hold a header",
        b"GGUF" + bytes(20),
        b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
        b"GGUF\x00\x00\x00\x03" + bytes(64),
    ],
)
def test_gguf_junk_is_refused(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"not a whole GGUF file|'missing' is not supported"):
        open_named_tensors(tmp_path / "m.gguf")
