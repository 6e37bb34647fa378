"""A model directory small enough to be made at test time, complete with tokenizer and template."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

D, F, L, N, K, H = 40, 56, 2, 6, 2, 16
MAX_MODEL_LEN = 192
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random two-layer Llama in Hugging Face's layout; its context is 192 tokens."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    directory.mkdir()
    vocab_size = _write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    _write_json(directory / "config.json", config)
    save_file(_tensors(vocab_size), directory / "model.safetensors")
    return directory


def _write_tokenizer(directory: pathlib.Path) -> int:
    """A byte-level BPE and its template; the size of the vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the quick brown fox jumps over the lazy dog", "a block holds the keys and the values"]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[2]}
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names},
    )
    return tokenizer.get_vocab_size()


def _tensors(vocab_size: int) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (vocab_size, D)}
    for layer in range(L):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (N * H, D),
            f"{prefix}.self_attn.k_proj.weight": (K * H, D),
            f"{prefix}.self_attn.v_proj.weight": (K * H, D),
            f"{prefix}.self_attn.o_proj.weight": (D, N * H),
            f"{prefix}.mlp.gate_proj.weight": (F, D),
            f"{prefix}.mlp.up_proj.weight": (F, D),
            f"{prefix}.mlp.down_proj.weight": (D, F),
        }
    rng = np.random.default_rng(7)
    tensors = {
        name: (0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{layer}.input_layernorm" for layer in range(L)]
    norms += [f"model.layers.{layer}.post_attention_layernorm" for layer in range(L)]
    for name in [*norms, "model.norm"]:
        tensors[f"{name}.weight"] = np.ones(D, np.float32)
    return tensors


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
