"""Trains a small Llama, with a tokenizer of its own, on plain text.

    python -m jpaged_models.train TEXT... --out DIRECTORY

Every so often the state goes to DIRECTORY/steps, from where the same command goes on if it was
stopped, and at its end finds the same numbers. Then DIRECTORY/model is a model for `LLM`, its
parameters in bfloat16.

A twentieth of the text, in pieces from everywhere in it, is held out: the model's loss there is
what is reported.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from jpaged_models.bpe import END, train_tokenizer
from jpaged_models.llama import Llama
from jpaged_models.registry import params_of, random_decoder
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.training import DTYPES, TrainConfig, held_out_loss, tiny_config, train
from jpaged_models.weights import save_checkpoint

PIECE = 20_000  # characters: every twentieth piece is held out
HELD_OUT = 20
REPORT_EVERY = 20  # steps


def main() -> None:
    """Trains what the command line names."""
    options = _options()
    try:
        _run(options)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last step that was kept\n")
        sys.exit(130)


def _run(options: argparse.Namespace) -> None:
    if (options.out / "model").exists():
        raise ValueError(f"{options.out / 'model'} is there already; name another --out")
    config = TrainConfig(
        steps=options.steps, dtype=options.dtype, seed=options.seed, batch_size=options.batch_size
    )
    trained, held_out = _parted(_text(options.texts))
    tokenizer = train_tokenizer(trained, vocab_size=options.vocab_size)
    tokens, unseen = (_encode(tokenizer, part) for part in (trained, [held_out]))
    shape = tiny_config(tokenizer.vocab_size, seq_len=config.seq_len)
    model = cast(Llama, random_decoder(shape, dtype=jnp.float32, seed=options.seed))
    print(f"{len(tokens):,} tokens to train on, {len(unseen):,} held out", file=sys.stderr)
    _report(train(model, tokens, config, folder=options.out / "steps"), config.steps)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(model))
    save_checkpoint(options.out / "model", narrow, shape, tokenizer)
    kept = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    nnx.update(model, kept)  # what is reported is of the model that was saved
    found = held_out_loss(model, unseen, len(held_out.encode()), seq_len=config.seq_len)
    print(
        f"held out: {found.nats_per_token:.3f} nats a token, {found.bits_per_byte:.3f} bits a byte"
    )


def _report(steps: Iterable[tuple[int, float]], last: int) -> None:
    """Goes through all steps, and says now and then how far it is."""
    start, first = time.perf_counter(), None
    for number, loss in steps:
        if first is None and number > 1:
            print(f"going on from step {number - 1}", file=sys.stderr)
        first = first or number
        if number % REPORT_EVERY == 0 or number == last:
            seconds = time.perf_counter() - start
            print(f"step {number}: {loss:.3f} nats a token, {seconds:.0f} s", file=sys.stderr)


def _refuse(why: str) -> NoReturn:
    sys.stderr.write(f"jpaged_models.train: {why}\n")
    sys.exit(2)


def _text(paths: list[pathlib.Path]) -> str:
    """All texts, one behind the other. Raises ValueError where they are not enough."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8 ({error}); convert it") from error
    text = END.join(texts)
    if len(text) < HELD_OUT * PIECE:
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"{names}: expected at least {HELD_OUT * PIECE:,} characters, got {len(text):,}"
        )
    return text


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
    add("--steps", type=int, default=1500, help="in all (%(default)s)")
    add("--batch-size", type=int, default=16, help="texts of 512 tokens a step (%(default)s)")
    add("--vocab-size", type=int, default=4096, help="of the tokenizer (%(default)s)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the products (%(default)s)")
    add("--seed", type=int, default=0, help="of the first weights and the texts (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
