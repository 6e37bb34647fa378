"""A decoder over whole texts, without a pool: what training needs, and gradients pass through."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged_models.layers import rotary_for
from jpaged_models.llama import Llama


def dense_logits(model: Llama, tokens: Int32[Array, "B C"]) -> Float[Array, "B C V"]:
    """The logits, in float32, that follow each token of B texts of equal length.

    The same network as `Llama.__call__` runs over the pool. Raises ValueError for a model whose
    layers do not see the whole text.
    """
    config = model.config
    if any(window is not None for window in config.layer_windows):
        raise ValueError(f"sliding windows are not supported here, got {config.layer_windows}")
    assert config.rope_theta is not None, "config_from_hf gives every Llama a rope_theta"
    B, C = tokens.shape
    rotary = rotary_for(
        jnp.tile(jnp.arange(C, dtype=jnp.int32), B),
        head_size=config.head_size,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )
    x = jnp.take(model.embedding[...], tokens.reshape(-1), axis=0)
    for layer in model.layers:
        q, k, v = layer.attention.project(layer.attention_norm(x), rotary)
        x = layer.finish(x, layer.attention.finish(_mix(q, k, v, num_texts=B)))
    return model.logits(model.norm(x)).reshape(B, C, -1)


def _mix(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"], *, num_texts: int
) -> Float[Array, "T N H"]:
    def by_text(x: Float[Array, "T J H"]) -> Float[Array, "B C J H"]:
        return x.reshape(num_texts, -1, *x.shape[1:])

    mixed = jax.nn.dot_product_attention(by_text(q), by_text(k), by_text(v), is_causal=True)
    return mixed.reshape(q.shape)
