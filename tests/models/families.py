"""A tiny config.json of every family, and weights that any side can make from their names."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from jpaged_models import ModelConfig, Tokenizer, config_from_hf

VOCAB_SIZE = 61
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": _LLAMA,
    "llama3": _LLAMA | {"rope_parameters": _LLAMA3_ROPE, "head_dim": 8},
    "llama-linear-rope": _LLAMA
    | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama-biases": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral-window": _LLAMA
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7},
    "smollm2-like": _LLAMA
    | {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "qwen2": _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2-window-above": _LLAMA
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 24,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 512,
        "bos_token_id": 0,
        "eos_token_id": None,
    },
}


def seeded_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values that depend on the name alone: PCG64's bits are the same everywhere.

    Products keep the size of what goes through them, so that attention and depth matter.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((bits >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)
    if len(shape) == 1:
        is_scale = name.endswith("weight")  # of a norm
        return 1 + uniform / 4 if is_scale else uniform / 2
    if "embed" in name or "wte" in name or "wpe" in name:
        return uniform
    return uniform * np.float32(2 / np.sqrt(min(shape)))


@dataclasses.dataclass
class SeededCheckpoint:
    """A checkpoint whose tensors are made from their names."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    source: str

    @property
    def tokenizer(self) -> Tokenizer:
        raise ValueError("there is no tokenizer")

    def names(self) -> frozenset[str]:
        return frozenset(self.shapes)

    def tensor(self, name: str) -> np.ndarray:
        return seeded_tensor(name, self.shapes[name])

    def close(self) -> None:
        pass


def seeded_checkpoint(family: str, shapes: dict[str, tuple[int, ...]]) -> SeededCheckpoint:
    """The family's checkpoint; `shapes` are those of Hugging Face's state dict."""
    return SeededCheckpoint(config_from_hf(FAMILIES[family]), shapes, f"a seeded {family}")
