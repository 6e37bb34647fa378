"""Small checkpoints written at test time: sizes are all different, so a swapped axis shows."""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from jpaged_models.weights import NamedTensors

D, F, V, L, N, K, H = 24, 40, 31, 2, 3, 1, 8

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "vocab_size": V,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def llama_tensors(seed: int = 0, *, biases: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Random weights of a tied Llama under Hugging Face's names."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(L):
        prefix = f"model.layers.{layer}."
        products = {
            "self_attn.q_proj": (N * H, D),
            "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D),
            "self_attn.o_proj": (D, N * H),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        for name, shape in products.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if name in biases:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (D,)
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in sorted(shapes.items())}


def write_directory(
    directory: pathlib.Path,
    tensors: dict[str, np.ndarray],
    *,
    num_shards: int = 0,
    **config: Any,
) -> pathlib.Path:
    """A directory in Hugging Face's layout: one file, or so many shards and their index."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", {**LLAMA_CONFIG, **config})
    if not num_shards:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::num_shards]}
        save_file(part, directory / file_name)
        weight_map.update(dict.fromkeys(part, file_name))
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory


def write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_gguf(
    path: pathlib.Path,
    architecture: str,
    values: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> pathlib.Path:
    """A GGUF file; a key that begins with a dot is the architecture's own."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add_value(writer, f"{architecture}{key}" if key.startswith(".") else key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


LLAMA_VALUES: dict[str, Any] = {
    ".context_length": 96,
    ".embedding_length": D,
    ".feed_forward_length": F,
    ".block_count": L,
    ".attention.head_count": N,
    ".attention.head_count_kv": K,
    ".attention.layer_norm_rms_epsilon": 1e-5,
    ".rope.dimension_count": H,
    ".rope.freq_base": 10000.0,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf_tensors(
    tensors: dict[str, np.ndarray], *, interleaved: bool = True
) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter stores them; `interleaved` is its `llama` alone."""
    stored: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        num_heads = {"self_attn.q_proj": N, "self_attn.k_proj": K}.get(stem)
        if interleaved and num_heads:
            array = converter_permute(array, num_heads)
        stored[f"{prefix}{GGUF_NAMES[stem]}.{kind}"] = array
    return stored


def converter_permute(array: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of a `llama`."""
    half = array.shape[0] // num_heads // 2
    split = array.reshape(num_heads, 2, half, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))


def assert_same(opened: NamedTensors, tensors: dict[str, np.ndarray]) -> None:
    assert opened.names() == frozenset(tensors)
    for name, expected in tensors.items():
        array = opened.tensor(name)
        assert array.dtype == expected.dtype, name
        np.testing.assert_array_equal(array, expected, err_msg=name)
