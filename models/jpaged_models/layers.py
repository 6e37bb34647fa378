"""The parts that decoders share: attention over the pool, norms, rotary positions, MLPs, the head.

Products accumulate in float32 and are cast where they are stored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged_models.config import ModelConfig
from jpaged_models.context import Phase, Rotary, StepContext
from jpaged_models.rope import RopeScaling, frequencies_of
from pallas_kernels import matrix_product, paged_attention, paged_decode, write_kv


@functools.partial(jax.jit, static_argnames="window")
def run_layer(
    layer: nnx.Module,
    x: Float[Array, "T D"],
    pool: Float[Array, "P K S W"],
    context: StepContext,
    **options: Any,
) -> tuple[Float[Array, "T D"], Float[Array, "P K S W"]]:
    """What the layer gives, traced once for all that are alike.

    To trace each of thirty is half of what a start takes when the compiler's work is cached. What
    is compiled is the same: XLA inlines the calls.
    """
    return layer(x, pool, context, **options)


def parameter(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A weight drawn from N(0, 0.02), or zeros where there are no `rngs`, which trace faster."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape)).astype(dtype))


class RMSNorm(nnx.Module):
    """Scales to unit root mean square, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        """The vectors of the last axis, normalised."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scaled = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return scaled * _like(self.weight[...], x)


class LayerNorm(nnx.Module):
    """Scales to zero mean and unit variance, in float32."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        """The vectors of the last axis, normalised."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.eps)
        return (scaled * _like(self.weight[...], x) + _like(self.bias[...], x)).astype(x.dtype)


class QKV(NamedTuple):
    """What attention works on."""

    q: Float[Array, "T N H"]
    k: Float[Array, "T K H"]
    v: Float[Array, "T K H"]


class Attention(nnx.Module):
    """Grouped-query attention over the pool.

    One product makes queries, keys and values; its columns are grouped by KV head, G queries and
    then the key and the value of each, so that KV heads can be sharded.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        D, K, G, H = (
            config.hidden_size,
            config.num_kv_heads,
            config.group_size,
            config.head_size,
        )
        self.qkv = parameter(rngs, (D, K, G + 2, H), dtype)
        self.out = parameter(rngs, (K * G * H, D), dtype)
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((K, G + 2, H), dtype))
        if config.output_bias:
            self.out_bias = nnx.Param(jnp.zeros(D, dtype))
        if config.qk_norm:
            self.q_norm = RMSNorm(H, eps=config.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(H, eps=config.norm_eps, dtype=dtype)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "T D"],
        pool: Float[Array, "P K S W"],
        context: StepContext,
        *,
        rotary: Rotary | None,
        window: int | None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "P K S W"]]:
        """The layer's output and the pool with this step's keys and values."""
        q, k, v = self.project(x, rotary)
        real = (context.positions >= 0)[:, None, None]  # padding writes zeros to the null block
        k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
        pool = write_kv(pool, k, v, context.slots, backend=context.backend)
        scale = self.config.head_size**-0.5
        return self.finish(_attend(q, pool, context, scale=scale, window=window)), pool

    def project(self, x: Float[Array, "T D"], rotary: Rotary | None) -> QKV:
        """Queries, keys and values, the first two turned by their token's position."""
        config = self.config
        T, K, G, H = x.shape[0], config.num_kv_heads, config.group_size, config.head_size
        qkv = _product(x, self.qkv[...])
        if config.qkv_bias:
            qkv += self.qkv_bias[...][None]
        q, k, v = qkv[:, :, :G], qkv[:, :, G], qkv[:, :, G + 1]
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(T, K * G, H)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return QKV(q, k, v)

    def finish(self, mixed: Float[Array, "T N H"]) -> Float[Array, "T D"]:
        """What the heads' results add to the residual."""
        T, N, H = mixed.shape
        out = _product(mixed.reshape(T, N * H), self.out[...])
        return out + self.out_bias[...][None] if self.config.output_bias else out


def _attend(
    q: Float[Array, "T N H"],
    pool: Float[Array, "P K S W"],
    context: StepContext,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    batch, backend = context.batch, context.backend
    if context.phase is Phase.DECODE:
        return paged_decode(
            q,
            pool,
            batch.block_tables,
            batch.seq_lens,
            scale=scale,
            window=window,
            backend=backend,
        )
    return paged_attention(q, pool, batch, scale=scale, window=window, backend=backend)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); gate and up in one product."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up = parameter(rngs, (D, 2, F), dtype)
        self.down = parameter(rngs, (F, D), dtype)
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((2, F), dtype))
            self.down_bias = nnx.Param(jnp.zeros(D, dtype))
        self.config = config

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the MLP adds to the residual."""
        gate_up = _product(x, self.gate_up[...])
        if self.config.mlp_bias:
            gate_up += self.gate_up_bias[...][None]
        hidden = activation(self.config.activation)(gate_up[:, 0]) * gate_up[:, 1]
        out = _product(hidden, self.down[...])
        return out + self.down_bias[...][None] if self.config.mlp_bias else out


class MLP(nnx.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.up = parameter(rngs, (D, F), dtype)
        self.up_bias = nnx.Param(jnp.zeros(F, dtype))
        self.down = parameter(rngs, (F, D), dtype)
        self.down_bias = nnx.Param(jnp.zeros(D, dtype))
        self.config = config

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the MLP adds to the residual."""
        hidden = _product(x, self.up[...]) + self.up_bias[...][None]
        hidden = activation(self.config.activation)(hidden)
        return _product(hidden, self.down[...]) + self.down_bias[...][None]


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that a config names."""
    table = {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
    }
    return table[name]


def head_logits(hidden: Float[Array, "T D"], head: Float[Array, "V D"]) -> Float[Array, "T V"]:
    """Logits in float32, from an embedding or an untied head stored [V, D]."""
    return matrix_product(hidden, head, is_transposed=True)


def rotary_for(
    positions: Int32[Array, " T"], *, head_size: int, theta: float, scaling: RopeScaling | None
) -> Rotary:
    """The rotations of RoPE (Su et al., arXiv 2104.09864) at each position, in float32."""
    frequencies = jnp.asarray(frequencies_of(head_size, theta, scaling), jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    factor = 1.0 if scaling is None else scaling.attention_factor
    if factor == 1.0:
        return Rotary(jnp.cos(angles), jnp.sin(angles))
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "T N H"], rotary: Rotary) -> Float[Array, "T N H"]:
    """Heads turned by their token's rotation; lane i pairs with lane i + H/2."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotary.cos[:, None, :], rotary.sin[:, None, :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(
        x.dtype
    )


def _product(x: Float[Array, "T D"], kernel: Float[Array, "D *out"]) -> Float[Array, "T *out"]:
    """Stored in the activations' dtype."""
    return matrix_product(x, kernel, dtype=x.dtype)


def _like(weight: Float[Array, " D"], x: Float[Array, "*dims D"]) -> Float[Array, "*ones D"]:
    """A weight with the leading axes that broadcasting needs."""
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)
