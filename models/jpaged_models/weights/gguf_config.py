"""GGUF metadata as a ModelConfig."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jpaged_models.config import ModelConfig
from jpaged_models.rope import RopeScaling, yarn_of
from jpaged_models.weights.gguf_file import PLAIN_TYPES, GGUFFile
from jpaged_models.weights.gguf_rope import llama3_from_factors

# `llama` is also what llama.cpp calls Mistral and SmolLM: the same layers throughout.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ROPE_FREQS = "rope_freqs.weight"
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The config of a GGUF file, from its metadata and from which tensors it holds."""
    name = architecture_of(file)
    get = _Metadata(file, name)
    is_gpt2 = name == "gpt2"
    hidden_size = get.integer("embedding_length")
    num_layers = get.integer("block_count")
    num_heads = get.integer("attention.head_count")
    head_size = get.integer("attention.key_length", hidden_size // max(num_heads, 1))
    _refuse_other_heads(get, head_size, is_gpt2)
    context = get.integer("context_length")
    theta = None if is_gpt2 else get.number("rope.freq_base", 10000.0)
    window = get.integer("attention.sliding_window", 0) or None
    epsilon = "layer_norm_epsilon" if is_gpt2 else "layer_norm_rms_epsilon"
    return ModelConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=get.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get.integer("attention.head_count_kv", num_heads),
        head_size=head_size,
        max_position_embeddings=context,
        norm_eps=get.number(f"attention.{epsilon}"),
        rope_theta=theta,
        rope_scaling=None if theta is None else _rope_scaling(file, get, theta, head_size),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias=is_gpt2 or "blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        activation="gelu_tanh" if is_gpt2 else "silu",
        layer_windows=(window,) * num_layers,
        dtype=_dtype(file),
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=end_token_ids(file.metadata),
    )


def _dtype(file: GGUFFile) -> str:
    """The one that its table of embeddings is kept in; bfloat16 where any tensor is quantised."""
    kinds = {tensor.kind.name for tensor in file.tensors.values()}
    if not kinds <= PLAIN_TYPES.keys():
        return "bfloat16"
    return PLAIN_TYPES[file.tensors["token_embd.weight"].kind.name]


def architecture_of(file: GGUFFile) -> str:
    """The file's own name for its architecture, one of those supported and with its weights."""
    name = file.metadata.get("general.architecture", "missing")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them first with "
            "`llama-gguf-split --merge`"
        )
    if file.metadata.get(f"{name}.expert_count", 0):
        raise ValueError(f"{file.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} holds no model weights (no tensor token_embd.weight)")
    return name


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text or a turn, each once."""
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


class _Metadata:
    """One architecture's metadata, with the type of each value checked."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self.file = file
        self.name = name

    def raw(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.name}.{key}", default)
        if value is None:
            raise ValueError(f"{self.file.path} lacks the metadata {self.name}.{key}")
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]  # one value a layer, all the same
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(  # noqa: TRY004
                f"{self.file.path}: {self.name}.{key} must be one integer, got {value!r}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(  # noqa: TRY004
                f"{self.file.path}: {self.name}.{key} must be one number, got {value!r}"
            )
        return float(value)


def _refuse_other_heads(get: _Metadata, head_size: int, is_gpt2: bool) -> None:
    value_size = get.integer("attention.value_length", head_size)
    if value_size != head_size:
        raise ValueError(
            f"{get.file.path}: keys of {head_size} beside values of {value_size} are not supported"
        )
    rotated = head_size if is_gpt2 else get.integer("rope.dimension_count", head_size)
    if rotated != head_size:
        raise ValueError(
            f"{get.file.path}: RoPE over {rotated} of {head_size} dimensions is not supported"
        )


def _rope_scaling(
    file: GGUFFile, get: _Metadata, theta: float, head_size: int
) -> RopeScaling | None:
    if ROPE_FREQS in file.tensors:
        original = get.integer("rope.scaling.original_context_length", 8192)
        return llama3_from_factors(
            file.tensor(ROPE_FREQS), theta=theta, head_size=head_size, original=original
        )
    kind = get.raw("rope.scaling.type", "linear")  # llama.cpp's own default
    if kind not in {"none", "linear", "yarn"}:
        raise ValueError(
            f"{file.path}: RoPE scaling {kind!r} is not supported; supported are none, linear, "
            "llama3 and yarn"
        )
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    if kind == "none" or factor in {0.0, 1.0}:  # 0 stands for "not given" there
        return None
    return RopeScaling(kind="linear", factor=factor) if kind == "linear" else _yarn(get, factor)


def _yarn(get: _Metadata, factor: float) -> RopeScaling:
    """As llama.cpp has yarn: Transformers' way, its factor of attention times two more."""
    extrapolated = get.number("rope.scaling.yarn_ext_factor", -1.0)  # below 0: not given
    if extrapolated >= 0 and extrapolated != 1:
        raise ValueError(
            f"{get.file.path}: a yarn_ext_factor of {extrapolated} is not supported; it must be 1"
        )
    context = get.integer("context_length")
    scaling = yarn_of(
        {
            "factor": factor,
            "original_max_position_embeddings": get.integer(
                "rope.scaling.original_context_length", context
            ),
            "beta_fast": get.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get.number("rope.scaling.yarn_beta_slow", 1.0),
            "mscale": 1.0,
            "mscale_all_dim": get.number("rope.scaling.yarn_log_multiplier", 0.0),
        },
        context,
    )
    more = [get.number(f"rope.scaling.{name}", 1.0) for name in ("attn_factor", "yarn_attn_factor")]
    return dataclasses.replace(scaling, attention_factor=scaling.attention_factor * math.prod(more))
