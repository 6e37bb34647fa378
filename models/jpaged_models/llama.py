"""The Llama family: Llama 2 and 3, Mistral, SmolLM2, Qwen2, Qwen3."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged_models.config import ModelConfig
from jpaged_models.context import Pools, Rotary, StepContext
from jpaged_models.layers import (
    Attention,
    GatedMLP,
    RMSNorm,
    head_logits,
    parameter,
    rotary_for,
    run_layer,
)


class LlamaLayer(nnx.Module):
    """Attention and a gated MLP, each normalised before and added to the residual."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        D = config.hidden_size
        self.attention_norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "T D"],
        pool: Float[Array, "P K S W"],
        context: StepContext,
        *,
        rotary: Rotary,
        window: int | None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "P K S W"]]:
        """The residual stream after the layer, and its pool with the new keys and values."""
        attended, pool = self.attention(
            self.attention_norm(x), pool, context, rotary=rotary, window=window
        )
        return self.finish(x, attended), pool

    def finish(self, x: Float[Array, "T D"], attended: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The residual stream after the layer, from what its attention gives."""
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.embedding = parameter(rngs, (V, D), dtype)
        self.layers = nnx.List(
            [LlamaLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = parameter(rngs, (V, D), dtype)
        self.config = config

    def __call__(
        self, tokens: Int32[Array, " T"], pools: Pools, context: StepContext
    ) -> tuple[Float[Array, "T D"], Pools]:
        """Hidden states before the head, and the pools with the step's keys and values."""
        config = self.config
        assert config.rope_theta is not None, "config_from_hf gives every Llama a rope_theta"
        x = jnp.take(self.embedding[...], tokens, axis=0)
        rotary = rotary_for(
            context.positions,
            head_size=config.head_size,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        written = []
        for layer, pool, window in zip(self.layers, pools, config.layer_windows, strict=True):
            x, new_pool = run_layer(layer, x, pool, context, rotary=rotary, window=window)
            written.append(new_pool)
        return self.norm(x), tuple(written)

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Logits in float32 of hidden states."""
        head = self.embedding if self.config.tie_word_embeddings else self.head
        return head_logits(hidden, head[...])


def llama_weights(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict:
    """The parameters as nested dicts of host arrays, from tensors under Hugging Face's names.

    A layer is a function that reads it. Hugging Face stores products [out, in]; ours are
    [in, out], so that a row of activations meets contiguous columns.
    """
    weights = {
        "embedding": read("model.embed_tokens.weight"),
        "layers": {
            # Read when asked for, so that the host holds one layer at a time.
            layer: functools.partial(_layer_weights, config, read, layer)
            for layer in range(config.num_layers)
        },
        "norm": {"weight": read("model.norm.weight")},
    }
    if not config.tie_word_embeddings:
        weights["head"] = read("lm_head.weight")
    return weights


def _layer_weights(config: ModelConfig, read: Callable[[str], np.ndarray], layer: int) -> dict:
    prefix = f"model.layers.{layer}."
    K, G, H = config.num_kv_heads, config.group_size, config.head_size

    def by_kv_head(kind: str) -> np.ndarray:
        parts = [read(f"{prefix}self_attn.{name}_proj.{kind}") for name in "qkv"]
        groups = [p.reshape(K, n, H, *p.shape[1:]) for p, n in zip(parts, (G, 1, 1), strict=True)]
        return np.concatenate(groups, axis=1)

    attention: dict = {
        "qkv": np.moveaxis(by_kv_head("weight"), -1, 0),
        "out": read(prefix + "self_attn.o_proj.weight").T,
    }
    if config.qkv_bias:
        attention["qkv_bias"] = by_kv_head("bias")
    if config.output_bias:
        attention["out_bias"] = read(prefix + "self_attn.o_proj.bias")
    if config.qk_norm:
        attention["q_norm"] = {"weight": read(prefix + "self_attn.q_norm.weight")}
        attention["k_norm"] = {"weight": read(prefix + "self_attn.k_norm.weight")}
    gate_up = [read(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up")]
    mlp = {"gate_up": np.stack(gate_up, axis=1), "down": read(prefix + "mlp.down_proj.weight").T}
    if config.mlp_bias:
        biases = [read(f"{prefix}mlp.{name}_proj.bias") for name in ("gate", "up")]
        mlp["gate_up_bias"] = np.stack(biases)
        mlp["down_bias"] = read(prefix + "mlp.down_proj.bias")
    return {
        "attention_norm": {"weight": read(prefix + "input_layernorm.weight")},
        "attention": attention,
        "mlp_norm": {"weight": read(prefix + "post_attention_layernorm.weight")},
        "mlp": mlp,
    }
