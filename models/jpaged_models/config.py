"""The shape of a network, read from a Hugging Face config.json of either spelling."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpaged_models.config_values import float_of, int_of, listed, object_of
from jpaged_models.rope import RopeScaling, rope_of

ARCHITECTURES = {  # config.json's model_type -> the class name it stands for
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATIONS = {  # Hugging Face's name -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides which arrays a network has and how they meet."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float | None  # None: learned positions
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    layer_windows: tuple[int | None, ...]  # None: the layer sees everything
    dtype: str  # the checkpoint's own
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        check_architecture(self.architecture)
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.rope_theta is not None and self.head_size % 2:
            raise ValueError(f"RoPE needs an even head_size, got {self.head_size}")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"layer_windows needs one entry for each of {self.num_layers} layers, got "
                f"{len(self.layer_windows)}"
            )
        if any(window is not None and window < 1 for window in self.layer_windows):
            raise ValueError(f"a sliding window must be at least 1, got {self.layer_windows}")
        if self.activation not in ACTIVATIONS.values():
            raise ValueError(f"activation must be one of {listed(ACTIVATIONS.values())}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {listed(DTYPES)}, got {self.dtype!r}")

    @property
    def context_length(self) -> int:
        """Tokens of the longest text: published configs of yarn may have it before stretching."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "yarn":
            return self.max_position_embeddings
        stretched = round(scaling.factor * scaling.original_max_position_embeddings)
        return max(stretched, self.max_position_embeddings)

    @property
    def group_size(self) -> int:
        """Query heads for each key/value head."""
        return self.num_heads // self.num_kv_heads


def config_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The config that a parsed config.json describes.

    Args:
        raw: config.json, in the spelling of any Transformers version; absent keys take the
            defaults of the architecture's Hugging Face class.
        generation: generation_config.json, whose end-of-sequence ids join the config's.
    """
    quantization = object_of(raw, "quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ValueError(
            f"this checkpoint is quantised ({method}); load its unquantised weights or a GGUF file"
        )
    architecture = _architecture(raw)
    make = _gpt2_fields if architecture == "GPT2LMHeadModel" else _llama_fields
    ids = {**_IDS.get(architecture, {}), **raw}  # a null in the file means none
    return ModelConfig(
        architecture=architecture,
        dtype=_dtype(raw),
        bos_token_id=None if ids.get("bos_token_id") is None else int_of(ids, "bos_token_id", None),
        eos_token_ids=_eos_token_ids(ids, generation or {}),
        **make(raw, architecture),
    )


def check_architecture(architecture: str) -> None:
    """Raises a `ValueError` that names the supported ones if this is none of them."""
    if architecture not in ARCHITECTURES.values():
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported are "
            f"{listed(ARCHITECTURES.values())}"
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "max_position_embeddings",
)

# What each Hugging Face class assumes where config.json is silent.
_LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "Qwen2ForCausalLM": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "Qwen3ForCausalLM": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
}
_IDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"bos_token_id": 1, "eos_token_id": 2},
    "MistralForCausalLM": {"bos_token_id": 1, "eos_token_id": 2},
    "GPT2LMHeadModel": {"bos_token_id": 50256, "eos_token_id": 50256},
}


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        architecture = str(names[0])
    else:
        model_type = str(raw.get("model_type", "missing"))
        architecture = ARCHITECTURES.get(model_type, f"of model_type {model_type}")
    check_architecture(architecture)
    return architecture


def _llama_fields(raw: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The fields of the Llama family; what its members differ in is named here and only here."""
    defaults = _LLAMA_DEFAULTS[architecture]
    hidden_size = int_of(raw, "hidden_size", 4096)
    num_layers = int_of(raw, "num_hidden_layers", 32)
    num_heads = int_of(raw, "num_attention_heads", 32)
    # A null count or size means the plain one in every class; what absence means differs.
    absent = {key: value for key, value in defaults.items() if key not in raw}
    num_kv_heads = int_of(raw, "num_key_value_heads", absent.get("num_key_value_heads", num_heads))
    head_size = int_of(raw, "head_dim", absent.get("head_dim", hidden_size // max(num_heads, 1)))
    max_positions = int_of(raw, "max_position_embeddings", defaults["max_position_embeddings"])
    attention_bias = bool(raw.get("attention_bias", False))
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    biased = architecture in {"LlamaForCausalLM", "Qwen3ForCausalLM"} and attention_bias
    theta, scaling = rope_of(raw, max_positions)
    return {
        "vocab_size": int_of(raw, "vocab_size", defaults["vocab_size"]),
        "hidden_size": hidden_size,
        "intermediate_size": int_of(raw, "intermediate_size", defaults["intermediate_size"]),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": head_size,
        "max_position_embeddings": max_positions,
        "norm_eps": float_of(raw, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": biased or is_qwen2,
        "output_bias": biased,
        "mlp_bias": architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "activation": _activation(raw.get("hidden_act", "silu")),
        "layer_windows": _layer_windows(raw, architecture, num_layers),
    }


def _gpt2_fields(raw: Mapping[str, Any], _architecture: str) -> dict[str, Any]:
    """The fields of GPT-2, which spells most of them its own way."""
    if not raw.get("scale_attn_weights", True) or raw.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "GPT-2 with scale_attn_weights=False or scale_attn_by_inverse_layer_idx=True is not "
            "supported; only the usual 1/sqrt(head size) scale is"
        )
    hidden_size = int_of(raw, "n_embd", 768)
    num_layers = int_of(raw, "n_layer", 12)
    num_heads = int_of(raw, "n_head", 12)
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"n_embd must be a multiple of n_head, got {hidden_size} and {num_heads}")
    return {
        "vocab_size": int_of(raw, "vocab_size", 50257),
        "hidden_size": hidden_size,
        "intermediate_size": int_of(raw, "n_inner", 4 * hidden_size),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_size": hidden_size // num_heads,
        "max_position_embeddings": int_of(raw, "n_positions", 1024),
        "norm_eps": float_of(raw, "layer_norm_epsilon", 1e-5),
        "rope_theta": None,
        "rope_scaling": None,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "activation": _activation(raw.get("activation_function", "gelu_new")),
        "layer_windows": (None,) * num_layers,
    }


def _layer_windows(
    raw: Mapping[str, Any], architecture: str, num_layers: int
) -> tuple[int | None, ...]:
    # Null means none, absence the classes' default.
    is_null = "sliding_window" in raw and raw["sliding_window"] is None
    window = None if is_null else int_of(raw, "sliding_window", 4096)
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    first = int_of(raw, "max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ValueError(f"config.json: layer_types must be a list of {listed(known)}, got {kinds}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that ends a text, generation_config.json's first, each once."""
    found: list[int] = []
    for source in (generation, raw):
        ids = source.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        found += [int_of({"eos_token_id": token_id}, "eos_token_id", None) for token_id in ids]
    return tuple(dict.fromkeys(found))


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"checkpoints of dtype {name!r} are not supported; {listed(DTYPES)} are")
    return name


def _activation(name: object) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"activation {name!r} is not supported; supported are {listed(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
