"""Tiny models of every family: weights from a NumPy seed, so that a golden holds only logits."""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "families"
PROMPT_LENGTHS = (1, 9, 40)  # alone, one past a block of 8, past every window below

_COMMON = {
    "vocab_size": 53,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# (Hugging Face's model_type, what its config class is given)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", _COMMON | {"tie_word_embeddings": False}),
    "llama3": ("llama", _COMMON | {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
    "llama_linear": ("llama", _COMMON | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_biases": ("llama", _COMMON | {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", _COMMON | {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "mistral": ("mistral", _COMMON | {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("qwen2", _COMMON),
    "qwen2_window": (
        "qwen2",
        _COMMON | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _COMMON | {"head_dim": 16}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 53,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 128,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
}


class Golden(NamedTuple):
    """What Transformers says of one family's tiny model."""

    config: dict[str, Any]  # config.json as Transformers saves it
    shapes: dict[str, list[int]]  # of the checkpoint's tensors
    prompts: list[list[int]]
    logits: list[np.ndarray]  # [C, V] of each prompt


def load_golden(name: str) -> Golden:
    """The committed golden of a family."""
    with np.load(GOLDENS / f"{name}.npz") as stored:
        about = json.loads(str(stored["about"]))
        logits = [stored[f"logits{i}"] for i in range(len(about["prompts"]))]
    return Golden(about["config"], about["shapes"], about["prompts"], logits)


def make_prompts(name: str, vocab_size: int) -> list[list[int]]:
    """The family's prompts, the same everywhere."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [rng.integers(3, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def make_tensor(name: str, shape: list[int]) -> np.ndarray:
    """The tensor of that name: large enough that context decides the logits."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def write_model(
    directory: pathlib.Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> None:
    """Writes the model as a directory in Hugging Face's layout, without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    tensors = {name: make_tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
