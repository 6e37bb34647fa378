"""The Llama family over a contiguous cache, in plain jax.numpy: what the baseline runs.

Float32 unless told otherwise, weights `[in, out]`, the q/k/v and gate/up matrices fused, layers
unrolled. Nothing here knows of blocks, requests or batches that change.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged_models import ModelConfig

MASKED = -1e30  # finite: with -inf, a row that sees nothing becomes NaN
# A turn of the decode walk reads WALK_ROWS x WALK_TOKENS x K x 2H numbers; they should stay in a
# core's L2 cache. At 3 KV heads of size 64 in float32 these are 1.5 MB.
WALK_ROWS = 16
WALK_TOKENS = 64
# Query tiles of a prompt: more of them waste less of the square above the diagonal.
QUERY_TILES = 4
QUERY_TOKENS = 128


@runtime_checkable  # the shape checker of the tests asks isinstance
class Weights(Protocol):
    """Where parameters come from: Hugging Face's names, matrices `[out, in]`."""

    config: ModelConfig

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor on the host."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix `[in, out]` and its bias, if it has one."""

    weight: Float[Array, "I O"]
    bias: Float[Array, " O"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; `q_norm` and `k_norm` are Qwen3's."""

    attention_norm: Float[Array, " D"]
    qkv: Linear
    q_norm: Float[Array, " H"] | None
    k_norm: Float[Array, " H"] | None
    out: Linear
    mlp_norm: Float[Array, " D"]
    gate_up: Linear
    down: Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """All weights; `head` is `embedding` itself where the model ties them."""

    embedding: Float[Array, "V D"]
    layers: tuple[Layer, ...]
    norm: Float[Array, " D"]
    head: Float[Array, "V D"]


Caches = tuple[Float[Array, "B K C W"], ...]  # a layer each; keys in lanes 0..H-1, values above


def load_params(weights: Weights, *, dtype: DTypeLike = "float32") -> Params:
    """The parameters on the device, fused for speed."""
    config = weights.config
    check_family(config)

    def array(name: str) -> Float[Array, "*dims"]:
        return jnp.asarray(weights.tensor(name), dtype)

    def linear(names: list[str], biased: bool) -> Linear:
        matrices = [weights.tensor(f"{name}.weight") for name in names]
        biases = [weights.tensor(f"{name}.bias") for name in names] if biased else []
        return Linear(
            jnp.asarray(np.concatenate(matrices).T, dtype),
            jnp.asarray(np.concatenate(biases), dtype) if biased else None,
        )

    def layer(number: int) -> Layer:
        start = f"model.layers.{number}."
        attention, mlp = start + "self_attn.", start + "mlp."
        return Layer(
            attention_norm=array(start + "input_layernorm.weight"),
            qkv=linear([f"{attention}{name}_proj" for name in "qkv"], config.qkv_bias),
            q_norm=array(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=array(attention + "k_norm.weight") if config.qk_norm else None,
            out=linear([attention + "o_proj"], config.output_bias),
            mlp_norm=array(start + "post_attention_layernorm.weight"),
            gate_up=linear([mlp + "gate_proj", mlp + "up_proj"], config.mlp_bias),
            down=linear([mlp + "down_proj"], config.mlp_bias),
        )

    embedding = array("model.embed_tokens.weight")
    return Params(
        embedding=embedding,
        layers=tuple(layer(number) for number in range(config.num_layers)),
        norm=array("model.norm.weight"),
        head=embedding if config.tie_word_embeddings else array("lm_head.weight"),
    )


def check_family(config: ModelConfig) -> None:
    """Raises a `ValueError` unless this is a network of the Llama family."""
    if config.rope_theta is None or config.activation != "silu":
        raise ValueError(
            f"the baseline runs the Llama family only, got {config.architecture} with activation "
            f"{config.activation}"
        )


def empty_caches(config: ModelConfig, *, num_rows: int, reserved: int, dtype: DTypeLike) -> Caches:
    """Zeros for `num_rows` rows of `reserved` tokens each, `[B, K, C, 2H]` a layer."""
    shape = (num_rows, config.num_kv_heads, reserved, 2 * config.head_size)
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))


def forward(
    params: Params, tokens: Int32[Array, " C"], *, config: ModelConfig
) -> Float[Array, "C V"]:
    """The logits at every position of one sequence, without a cache."""
    x_CD, _ = _prompt_states(params, tokens, config)
    return _logits(params, x_CD)


def prefill(
    params: Params, tokens: Int32[Array, " C"], length: Int32[Array, ""], *, config: ModelConfig
) -> tuple[list[Float[Array, "C K W"]], Float[Array, " V"]]:
    """Each layer's keys and values of one prompt, and the logits after its last token.

    The prompt is padded on the right to `C`; what the padding leaves in a cache lies beyond the
    row's length, where decoding overwrites it before it is seen.
    """
    x_CD, all_kv = _prompt_states(params, tokens, config)
    last_D = jax.lax.dynamic_index_in_dim(x_CD, length - 1, keepdims=True)
    return all_kv, _logits(params, last_D)[0]


def store_prompt(
    caches: Caches, all_kv: list[Float[Array, "T K W"]], row: Int32[Array, ""]
) -> Caches:
    """The caches with a prefilled prompt at the start of `row`."""
    stored = []
    for cache, kv in zip(caches, all_kv, strict=True):
        kv_1KCW = jnp.moveaxis(kv, 0, 1)[None].astype(cache.dtype)
        stored.append(jax.lax.dynamic_update_slice(cache, kv_1KCW, (row, 0, 0, 0)))
    return tuple(stored)


def decode(
    params: Params,
    caches: Caches,
    tokens: Int32[Array, " B"],
    lens: Int32[Array, " B"],
    *,
    config: ModelConfig,
) -> tuple[Caches, Float[Array, "B V"]]:
    """The caches with one more token in each row, and the logits after it.

    Args:
        params: the weights.
        caches: donated by the caller's jit.
        tokens: each row's newest token, which is not in the cache yet.
        lens: tokens in each row's cache; 0 marks a row that has ended, which is left alone.
        config: the network's shape.
    """
    reserved = caches[0].shape[2]
    rows_B = jnp.arange(tokens.shape[0])
    slots_B = jnp.where(lens > 0, lens, reserved)  # an ended row's write is dropped
    seen_B = jnp.where(lens > 0, lens + 1, 0)
    rope = _rope_angles(config, lens)
    x_BD = params.embedding[tokens]
    written = []
    for layer, cache, window in zip(params.layers, caches, config.layer_windows, strict=True):
        q_BNH, kv_BKW = _project(layer, x_BD, rope, config)
        cache = cache.at[rows_B, :, slots_B].set(kv_BKW.astype(cache.dtype), mode="drop")
        written.append(cache)
        x_BD = _finish_layer(layer, x_BD, _walk_caches(q_BNH, cache, seen_B, window), config)
    return tuple(written), _logits(params, _norm(x_BD, params.norm, config.norm_eps))


class _Rope(NamedTuple):
    cos: Float[Array, "T H//2"]
    sin: Float[Array, "T H//2"]


def _prompt_states(
    params: Params, tokens: Int32[Array, " C"], config: ModelConfig
) -> tuple[Float[Array, "C D"], list[Float[Array, "C K W"]]]:
    """The normed last states of a whole sequence, and each layer's keys and values."""
    rope = _rope_angles(config, jnp.arange(tokens.shape[0]))
    x_CD = params.embedding[tokens]
    all_kv = []
    for layer, window in zip(params.layers, config.layer_windows, strict=True):
        q_CNH, kv_CKW = _project(layer, x_CD, rope, config)
        all_kv.append(kv_CKW)
        x_CD = _finish_layer(layer, x_CD, _causal_attention(q_CNH, kv_CKW, window), config)
    return _norm(x_CD, params.norm, config.norm_eps), all_kv


def _project(
    layer: Layer, x: Float[Array, "T D"], rope: _Rope, config: ModelConfig
) -> tuple[Float[Array, "T N H"], Float[Array, "T K W"]]:
    """Queries, scaled, and the row of keys and values that the cache holds."""
    T = x.shape[0]
    N, K, H = config.num_heads, config.num_kv_heads, config.head_size
    qkv = _linear(layer.qkv, _norm(x, layer.attention_norm, config.norm_eps))
    q, k, v = (part.reshape(T, -1, H) for part in jnp.split(qkv, [N * H, (N + K) * H], axis=-1))
    if layer.q_norm is not None and layer.k_norm is not None:
        q = _norm(q, layer.q_norm, config.norm_eps)
        k = _norm(k, layer.k_norm, config.norm_eps)
    q, k = _rotate(q, rope), _rotate(k, rope)
    return q / math.sqrt(H), jnp.concatenate([k, v], axis=-1)


def _finish_layer(
    layer: Layer, x: Float[Array, "T D"], attended: Float[Array, "T N H"], config: ModelConfig
) -> Float[Array, "T D"]:
    x += _linear(layer.out, attended.reshape(x.shape[0], -1))
    gate_up = _linear(layer.gate_up, _norm(x, layer.mlp_norm, config.norm_eps))
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return x + _linear(layer.down, jax.nn.silu(gate) * up)


def _causal_attention(
    q: Float[Array, "C N H"], kv: Float[Array, "C K W"], window: int | None
) -> Float[Array, "C N H"]:
    """Attention of a whole sequence to itself, in a few query tiles along the diagonal."""
    C, N, H = q.shape
    K = kv.shape[1]
    k_KCH, v_KCH = jnp.moveaxis(kv[..., :H], 0, 1), jnp.moveaxis(kv[..., H:], 0, 1)
    q_KCGH = jnp.moveaxis(q.reshape(C, K, N // K, H), 0, 1)
    tile = max(QUERY_TOKENS, math.ceil(C / QUERY_TILES))
    tiles = []
    for start in range(0, C, tile):
        end = min(start + tile, C)
        first = 0 if window is None else max(0, start - window + 1)
        q_KQH = q_KCGH[:, start:end].reshape(K, -1, H)
        logits = _product("KQH,KCH->KQC", q_KQH, k_KCH[:, first:end])
        positions_Q = jnp.repeat(jnp.arange(start, end), N // K)[:, None]
        context_C = jnp.arange(first, end)[None, :]
        visible = context_C <= positions_Q
        if window is not None:
            visible &= context_C > positions_Q - window
        weights = jax.nn.softmax(jnp.where(visible[None], logits, MASKED), axis=-1)
        out = _product("KQC,KCH->KQH", weights.astype(kv.dtype), v_KCH[:, first:end])
        tiles.append(out.astype(q.dtype).reshape(K, end - start, N // K, H))
    return jnp.moveaxis(jnp.concatenate(tiles, axis=1), 0, 1).reshape(C, N, H)


def _walk_caches(
    q: Float[Array, "B N H"],
    cache: Float[Array, "B K C W"],
    lens: Int32[Array, " B"],
    window: int | None,
) -> Float[Array, "B N H"]:
    """Attention of one token a row, WALK_ROWS rows at a time; a row of length 0 gives zeros."""
    B, N, H = q.shape
    K = cache.shape[1]
    # The query's upper lanes are zero, and the values come out in the upper lanes: no K or V is
    # ever sliced out of a tile, which would copy it.
    q_BKGW = jnp.pad(q.reshape(B, K, N // K, H), [(0, 0), (0, 0), (0, 0), (0, H)])
    found = []
    for first in range(0, B, WALK_ROWS):
        rows = slice(first, first + WALK_ROWS)
        found.append(_walk(q_BKGW[rows], cache, first, lens[rows], window))
    return jnp.concatenate(found)[..., H:].reshape(B, N, H).astype(q.dtype)


def _walk(
    q: Float[Array, "B K G W"],
    cache: Float[Array, "R K C W"],
    first_row: int,
    lens: Int32[Array, " B"],
    window: int | None,
) -> Float[Array, "B K G W"]:
    """Rows from `first_row` on against their caches, up to the longest live one."""
    B, K, G, W = q.shape
    reserved = cache.shape[2]
    tokens = min(WALK_TOKENS, reserved)

    def turn(tile: Int32[Array, ""], state: tuple[Array, Array, Array]) -> tuple:
        high, total, values = state
        # The last tile of a reservation that is no multiple of a tile starts early, and does not
        # count again what the turn before it saw.
        start = jnp.minimum(tile * tokens, reserved - tokens)
        kv = jax.lax.dynamic_slice(cache, (first_row, 0, start, 0), (B, K, tokens, W))
        positions_C = (start + jnp.arange(tokens))[None, :]
        visible_BC = (positions_C < lens[:, None]) & (positions_C >= tile * tokens)
        if window is not None:
            visible_BC &= positions_C >= lens[:, None] - window
        visible = visible_BC[:, None, None, :]
        logits = jnp.where(visible, _product("BKGW,BKCW->BKGC", q, kv), MASKED)
        new_high = jnp.maximum(high, jnp.max(logits, axis=-1, keepdims=True))
        shrink = jnp.exp(high - new_high)
        weights = jnp.where(visible, jnp.exp(logits - new_high), 0)
        weighted = _product("BKGC,BKCW->BKGW", weights.astype(kv.dtype), kv)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_high, total, values * shrink + weighted

    first = jnp.int32(0)
    if window is not None:
        shortest = jnp.min(jnp.where(lens > 0, lens, reserved))
        first = jnp.maximum(shortest - window, 0) // tokens
    state = (
        jnp.full((B, K, G, 1), MASKED, jnp.float32),
        jnp.zeros((B, K, G, 1), jnp.float32),
        jnp.zeros((B, K, G, W), jnp.float32),
    )
    _, total, values = jax.lax.fori_loop(first, -(-jnp.max(lens) // tokens), turn, state)
    return values / jnp.where(total > 0, total, 1)


def _rope_angles(config: ModelConfig, positions: Int32[Array, " T"]) -> _Rope:
    assert config.rope_theta is not None, "check_family has refused learned positions"
    H = config.head_size
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, H, 2, dtype=np.float32) / H)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        # Llama 3: long wavelengths are stretched, short ones kept, those between blended.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    angles = positions[:, None].astype(jnp.float32) * frequencies.astype(np.float32)[None, :]
    return _Rope(jnp.cos(angles), jnp.sin(angles))


def _rotate(x: Float[Array, "T N H"], rope: _Rope) -> Float[Array, "T N H"]:
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def _norm(x: Float[Array, "*dims D"], weight: Float[Array, " D"], eps: float) -> Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def _linear(linear: Linear, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
    y = _rows_product("TI,IO->TO", x, linear.weight)
    return (y if linear.bias is None else y + linear.bias[None, :]).astype(x.dtype)


def _logits(params: Params, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    return _rows_product("TD,VD->TV", x, params.head)


def _rows_product(formula: str, x: Float[Array, "T A"], weight: Array) -> Array:
    """Rows times a weight; a single one of bfloat16, at which XLA's CPU is slow, goes as two."""
    T = x.shape[0]
    if T == 1 and x.dtype != jnp.float32:
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    return _product(formula, x, weight)[:T]


def _product(formula: str, a: Array, b: Array) -> Array:
    """An einsum summed in float32; said so, XLA's CPU also runs bf16 without a copy."""
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)
