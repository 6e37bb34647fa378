"""GPT-2: learned positions, LayerNorm, biases everywhere, a plain GELU MLP."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged_models.config import ModelConfig
from jpaged_models.context import Pools, StepContext
from jpaged_models.layers import (
    MLP,
    Attention,
    LayerNorm,
    head_logits,
    parameter,
    run_layer,
)


class GPT2Layer(nnx.Module):
    """Attention and an MLP, each normalised before and added to the residual."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        D = config.hidden_size
        self.attention_norm = LayerNorm(D, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(D, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "T D"],
        pool: Float[Array, "P K S W"],
        context: StepContext,
        *,
        window: int | None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "P K S W"]]:
        """The residual stream after the layer, and its pool with the new keys and values."""
        attended, pool = self.attention(
            self.attention_norm(x), pool, context, rotary=None, window=window
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pool


class GPT2(nnx.Module):
    """A decoder with learned positions and a tied head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.embedding = parameter(rngs, (V, D), dtype)
        self.positions = parameter(rngs, (config.max_position_embeddings, D), dtype)
        self.layers = nnx.List(
            [GPT2Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = LayerNorm(D, eps=config.norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = parameter(rngs, (V, D), dtype)
        self.config = config

    def __call__(
        self, tokens: Int32[Array, " T"], pools: Pools, context: StepContext
    ) -> tuple[Float[Array, "T D"], Pools]:
        """Hidden states before the head, and the pools with the step's keys and values."""
        positions_T = jnp.maximum(context.positions, 0)  # padding tokens have negative ones
        x = jnp.take(self.embedding[...], tokens, axis=0)
        x += jnp.take(self.positions[...], positions_T, axis=0)
        written = []
        for layer, pool, window in zip(self.layers, pools, self.config.layer_windows, strict=True):
            x, new_pool = run_layer(layer, x, pool, context, window=window)
            written.append(new_pool)
        return self.norm(x), tuple(written)

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Logits in float32 of hidden states."""
        head = self.embedding if self.config.tie_word_embeddings else self.head
        return head_logits(hidden, head[...])


def gpt2_weights(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict:
    """The parameters as nested dicts of host arrays, from tensors under Hugging Face's names.

    A layer is a function that reads it. GPT-2's own products are stored [in, out] already.
    """
    weights = {
        "embedding": read("transformer.wte.weight"),
        "positions": read("transformer.wpe.weight"),
        "layers": {
            # Read when asked for, so that the host holds one layer at a time.
            layer: functools.partial(_layer_weights, config, read, layer)
            for layer in range(config.num_layers)
        },
        "norm": _norm(read, "transformer.ln_f"),
    }
    if not config.tie_word_embeddings:
        weights["head"] = read("lm_head.weight")
    return weights


def _layer_weights(config: ModelConfig, read: Callable[[str], np.ndarray], layer: int) -> dict:
    prefix = f"transformer.h.{layer}."
    D, N, H = config.hidden_size, config.num_heads, config.head_size
    return {
        "attention_norm": _norm(read, prefix + "ln_1"),
        "attention": {
            "qkv": read(prefix + "attn.c_attn.weight").reshape(D, 3, N, H).swapaxes(1, 2),
            "qkv_bias": read(prefix + "attn.c_attn.bias").reshape(3, N, H).swapaxes(0, 1),
            "out": read(prefix + "attn.c_proj.weight"),
            "out_bias": read(prefix + "attn.c_proj.bias"),
        },
        "mlp_norm": _norm(read, prefix + "ln_2"),
        "mlp": {
            "up": read(prefix + "mlp.c_fc.weight"),
            "up_bias": read(prefix + "mlp.c_fc.bias"),
            "down": read(prefix + "mlp.c_proj.weight"),
            "down_bias": read(prefix + "mlp.c_proj.bias"),
        },
    }


def _norm(read: Callable[[str], np.ndarray], name: str) -> dict:
    return {"weight": read(name + ".weight"), "bias": read(name + ".bias")}
