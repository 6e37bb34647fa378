"""Trains a small Llama, with a tokenizer of its own, on plain text.

    python -m jpaged_models.train TEXT... --out DIRECTORY

AdamW (Loshchilov and Hutter, arXiv 1711.05101) under a cosine schedule, with gradients clipped by
their norm. Weights and moments are float32; with --dtype bfloat16 the products are narrower. Every
so often the state goes to DIRECTORY/steps, from where the same command goes on if it was stopped,
and at its end finds the same numbers. Then DIRECTORY/model is a model for `LLM`.

A twentieth of the text, in pieces from everywhere in it, is held out: its loss is what is reported.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged_models.bpe import END, train_tokenizer
from jpaged_models.config import ModelConfig
from jpaged_models.dense import dense_logits
from jpaged_models.llama import Llama
from jpaged_models.registry import params_of, random_decoder
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.train_state import KeptSteps, TrainState
from jpaged_models.weights import save_checkpoint

PIECE = 20_000  # characters: every twentieth piece is held out
HELD_OUT = 20


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
    save_every: int = 200


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

    Args:
        model: its parameters are replaced as training goes on, and those it had are deleted.
        tokens: the text; each step takes pieces of it that `config.seed` and its number decide.
        config: how long, how fast, in which pieces.
        folder: where the state is kept and found again; None keeps nothing.

    Raises:
        ValueError: `folder` holds a run of another config, text or network.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = _optimizer(config)
    state = TrainState(params, optimizer.init(params))
    kept = None if folder is None else _kept_steps(folder, model.config, tokens, config)
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
    """The loss on a text of `num_bytes`, cut into whole pieces of `seq_len` tokens."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = jax.jit(functools.partial(_loss, graph, rest, jnp.dtype("float32")))
    count = (len(tokens) - 1) // seq_len
    starts = seq_len * np.arange(count)
    losses = [
        float(loss(params, tokens[np.newaxis, start : start + seq_len + 1])) for start in starts
    ]
    nats = sum(losses) / count
    return HeldOut(nats, nats / math.log(2) * len(tokens) / num_bytes)


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


def main() -> None:
    """Trains what the command line names."""
    options = _options()
    if (options.out / "model").exists():
        _refuse(f"{options.out / 'model'} is there already; name another --out")
    if options.steps < 1:
        _refuse(f"--steps must be at least 1, got {options.steps}")
    if missing := [str(path) for path in options.texts if not path.is_file()]:
        _refuse(f"there is no file {', '.join(missing)}")
    text = END.join(path.read_text(encoding="utf-8") for path in options.texts)
    if len(text) < HELD_OUT * PIECE:
        names = ", ".join(map(str, options.texts))
        _refuse(f"{names}: expected at least {HELD_OUT * PIECE:,} characters, got {len(text):,}")
    trained, held_out = _parted(text)
    tokenizer = train_tokenizer(trained, vocab_size=options.vocab_size)
    tokens, unseen = (_encode(tokenizer, part) for part in (trained, [held_out]))
    config = TrainConfig(
        steps=options.steps, dtype=options.dtype, seed=options.seed, batch_size=options.batch_size
    )
    shape = tiny_config(tokenizer.vocab_size, seq_len=config.seq_len)
    model = cast(Llama, random_decoder(shape, dtype=jnp.float32, seed=options.seed))
    print(f"{len(text):,} characters, {len(tokens):,} tokens to train on", file=sys.stderr)
    start = time.perf_counter()
    try:
        for number, loss in train(model, tokens, config, folder=options.out / "steps"):
            if number % 20 == 0 or number == config.steps:
                seconds = time.perf_counter() - start
                print(f"step {number}: {loss:.3f} nats a token, {seconds:.0f} s", file=sys.stderr)
    except ValueError as error:
        _refuse(str(error))
    found = held_out_loss(model, unseen, len(held_out.encode()), seq_len=config.seq_len)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(model))
    save_checkpoint(options.out / "model", narrow, shape, tokenizer)
    print(
        f"held out: {found.nats_per_token:.3f} nats a token, {found.bits_per_byte:.3f} bits a byte"
    )


def _refuse(why: str) -> NoReturn:
    sys.stderr.write(f"jpaged_models.train: {why}\n")
    sys.exit(2)


def _parted(text: str) -> tuple[list[str], str]:
    """What is trained on, and what is held out."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT]
    trained = [piece for i, piece in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]
    return trained, "".join(held_out)


def _encode(tokenizer: Tokenizer, pieces: list[str]) -> Int32[np.ndarray, " T"]:
    return np.asarray([i for piece in pieces for i in tokenizer.encode(piece)], np.int32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jpaged_models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("texts", nargs="+", type=pathlib.Path, metavar="TEXT", help="files in UTF-8")
    add("--out", type=pathlib.Path, required=True, metavar="DIRECTORY")
    add("--steps", type=int, default=1500)
    add("--batch-size", type=int, default=16)
    add("--vocab-size", type=int, default=4096)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
