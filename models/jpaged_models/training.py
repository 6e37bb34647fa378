"""Training of a small network on plain text: AdamW under a cosine schedule, gradients clipped.

AdamW is of Loshchilov and Hutter, arXiv 1711.05101. Weights and moments are float32; with dtype
bfloat16 the products are narrower.
"""

import dataclasses
import functools
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged_models.config import ModelConfig
from jpaged_models.dense import dense_logits
from jpaged_models.llama import Llama
from jpaged_models.train_state import KeptSteps, TrainState

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast; a step takes `batch_size` texts of `seq_len` tokens."""

    steps: int
    batch_size: int = 16
    seq_len: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_norm: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


class HeldOut(NamedTuple):
    """Loss on text that was not trained on."""

    nats_per_token: float
    bits_per_byte: float


def tiny_config(vocab_size: int, *, seq_len: int) -> ModelConfig:
    """The network of `model="tiny"`: three million parameters, GQA of 3 query heads to one."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_layers=6,
        num_heads=3,
        num_kv_heads=1,
        head_size=64,
        max_position_embeddings=seq_len,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        activation="silu",
        layer_windows=(None,) * 6,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(0,),
    )


def train(
    model: Llama,
    tokens: Int32[np.ndarray, " T"],
    config: TrainConfig,
    *,
    folder: pathlib.Path | None = None,
) -> Iterator[tuple[int, float]]:
    """Trains `model` in place; after each step its number, from 1 on, and its loss in nats.

    A step is done when its number is asked for: a loop over all of them trains to the end.

    Args:
        model: its parameters are replaced as training goes on, and those it had are deleted.
        tokens: the text; each step takes pieces of it that `config.seed` and its number decide.
        config: how long, how fast, in which pieces.
        folder: where the state is kept and found again; None keeps nothing.

    Raises:
        ValueError: `folder` holds a run of another config, text or network; the text is shorter
            than a piece, or has ids that the network does not know.
    """
    _check_tokens(tokens, model.config.vocab_size, seq_len=config.seq_len)
    kept = None if folder is None else _kept_steps(folder, model.config, tokens, config)
    return _steps(model, tokens, config, kept)


def _steps(
    model: Llama, tokens: Int32[np.ndarray, " T"], config: TrainConfig, kept: KeptSteps | None
) -> Iterator[tuple[int, float]]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = _optimizer(config)
    state = TrainState(params, optimizer.init(params))
    first = 0
    if kept is not None and (last := kept.last(state)) is not None:
        first, state = last
    step = jax.jit(
        functools.partial(_step, graph, rest, optimizer, jnp.dtype(config.dtype)), donate_argnums=0
    )
    nnx.update(model, state.params)
    try:
        for number in range(first + 1, config.steps + 1):
            state, loss = step(state, _pieces(tokens, config, number))
            nnx.update(model, state.params)
            if kept is not None:
                kept.save(number, state, is_last=number == config.steps)
            yield number, float(loss)
    finally:
        if kept is not None:
            kept.close()


def held_out_loss(
    model: Llama, tokens: Int32[np.ndarray, " T"], num_bytes: int, *, seq_len: int
) -> HeldOut:
    """The loss on a text of `num_bytes`, cut into whole pieces of `seq_len` tokens.

    Raises ValueError for a text that is shorter than a piece or has unknown ids.
    """
    _check_tokens(tokens, model.config.vocab_size, seq_len=seq_len)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = jax.jit(functools.partial(_loss, graph, rest, jnp.dtype("float32")))
    count = (len(tokens) - 1) // seq_len
    starts = seq_len * np.arange(count)
    losses = [
        float(loss(params, tokens[np.newaxis, start : start + seq_len + 1])) for start in starts
    ]
    nats = sum(losses) / count
    return HeldOut(nats, nats / math.log(2) * len(tokens) / num_bytes)


def _check_tokens(tokens: Int32[np.ndarray, " T"], vocab_size: int, *, seq_len: int) -> None:
    if len(tokens) <= seq_len:
        raise ValueError(
            f"expected more tokens than seq_len={seq_len}, got {len(tokens)}; give a longer text"
        )
    if not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"expected token ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}; "
            "the tokenizer is not this network's"
        )


def _kept_steps(
    folder: pathlib.Path, network: ModelConfig, tokens: np.ndarray, config: TrainConfig
) -> KeptSteps:
    begun_with = {
        **dataclasses.asdict(config),
        **{f"network.{name}": value for name, value in dataclasses.asdict(network).items()},
        "text": f"{len(tokens)} tokens, CRC {zlib.crc32(tokens.tobytes()):08x}",
    }
    return KeptSteps(folder, begun_with, save_every=config.save_every)


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    warmup = min(config.warmup_steps, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, end_value=0.1 * config.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_norm),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=_decayed),
    )


def _decayed(params: Any) -> Any:
    """Matrices; not the scales of norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _step(
    graph: nnx.GraphDef,
    rest: nnx.State,
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    state: TrainState,
    pieces: Int32[Array, "B C+1"],
) -> tuple[TrainState, Float[Array, ""]]:
    loss, gradients = jax.value_and_grad(functools.partial(_loss, graph, rest, dtype))(
        state.params, pieces
    )
    updates, moments = optimizer.update(gradients, state.moments, state.params)
    return TrainState(cast(nnx.State, optax.apply_updates(state.params, updates)), moments), loss


def _loss(
    graph: nnx.GraphDef,
    rest: nnx.State,
    dtype: jnp.dtype,
    params: nnx.State,
    pieces: Int32[Array, "B C+1"],
) -> Float[Array, ""]:
    """Mean nats a token; the network computes in `dtype`."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    logits = dense_logits(nnx.merge(graph, narrow, rest), pieces[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:]).mean()


def _pieces(
    tokens: Int32[np.ndarray, " T"], config: TrainConfig, number: int
) -> Int32[np.ndarray, "B C+1"]:
    """The texts of a step: the same whenever it is done."""
    rng = np.random.default_rng((config.seed, number))
    starts = rng.integers(0, len(tokens) - config.seq_len, config.batch_size)
    return np.stack([tokens[start : start + config.seq_len + 1] for start in starts])
