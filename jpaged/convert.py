"""A model from any checkpoint, kept as Orbax keeps it: `jpaged convert SOURCE DEST`."""

import contextlib
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged_models import DTYPES, load_decoder, open_checkpoint, params_of, save_checkpoint


class Converted(NamedTuple):
    """What was written."""

    source: str
    dtype: str
    num_parameters: int


def convert(
    source: str | os.PathLike | None,
    directory: str | os.PathLike,
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> Converted:
    """Writes the model that `source` names to `directory`, which `LLM(directory)` loads.

    Args:
        source: what `LLM` takes: a directory in Hugging Face's layout or of this function's making,
            a .gguf file, a hub id or "tiny".
        directory: is not there yet, or is empty.
        dtype: of the parameters; "auto" keeps the checkpoint's, bfloat16 for a quantised file.
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: the model cannot be read, or there is something in `directory`.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    with contextlib.closing(open_checkpoint(source, revision=revision)) as checkpoint:
        wanted = jnp.dtype(checkpoint.config.dtype if dtype == "auto" else dtype)
        tokenizer = checkpoint.tokenizer
        params = params_of(load_decoder(checkpoint, dtype=wanted))
        save_checkpoint(directory, params, checkpoint.config, tokenizer)
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Converted(checkpoint.source, str(wanted), num_parameters)
