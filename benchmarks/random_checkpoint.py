"""A checkpoint of random weights in Hugging Face's layout, for machines without model files."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

SMOLLM2 = {  # the shapes of the default model
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = SMOLLM2 | {  # those of Llama 3.1 8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = SMOLLM2 | {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LONG = SMOLLM2 | {  # small enough for a hundred thousand tokens on two CPU cores
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rope_theta": 500000.0,
}


def write_checkpoint(directory: pathlib.Path, config: dict, *, seed: int) -> pathlib.Path:
    """Normal matrices stored in float16, norms of ones; a tied Llama.

    The matrices are large enough that the context decides the next token.
    """
    rng = np.random.default_rng(seed)
    deviation = np.float32(1.2 / np.sqrt(config["hidden_size"]))
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in _shapes(config).items():
        values = rng.standard_normal(shape, np.float32) * deviation
        tensors[name] = (np.ones_like(values) if len(shape) == 1 else values).astype(np.float16)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    V, D, F = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (V, D), "norm": (D,)}
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (queries, D),
            "self_attn.k_proj": (keys, D),
            "self_attn.v_proj": (keys, D),
            "self_attn.o_proj": (D, queries),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return {f"model.{name}.weight": shape for name, shape in shapes.items()}
