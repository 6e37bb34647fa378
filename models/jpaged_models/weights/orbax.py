"""Checkpoints of our own: a directory in which Orbax keeps parameters as the decoder holds them.

jpaged.json      the fields of ModelConfig
params/          what Orbax saved, a tree of the decoder's parameters
tokenizer.json, tokenizer_config.json, chat_template.jinja    where the model has them
"""

import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

import jax

from jpaged_models.config import ModelConfig
from jpaged_models.rope import RopeScaling
from jpaged_models.tokenizer import Tokenizer, read_json, save_tokenizer, tokenizer_in

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

CONFIG_FILE = "jpaged.json"
PARAMS = "params"


class OrbaxCheckpoint:
    """A directory that `save_checkpoint` has written."""

    quantized = False

    def __init__(self, directory: pathlib.Path, *, source: str) -> None:
        self.directory = directory
        self.source = source
        self.config = _read_config(directory / CONFIG_FILE)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The directory's tokenizer, or None. Raises ValueError for one that cannot be read."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_in(self.directory, self.config)
        return self._tokenizer

    def restore(self, abstract: dict) -> dict:
        """The parameters on the default device, with the shapes and dtypes of `abstract`.

        Raises ValueError where the directory does not hold them.
        """
        path = (self.directory / PARAMS).absolute()
        if not path.is_dir():
            raise ValueError(f"{self.source} has no {PARAMS}; is the copy complete?")
        wanted = _with_text_keys(jax.tree.map(_placed, abstract))
        checkpointer = _checkpointer()
        saved: Any = checkpointer.metadata(path)
        if saved.item_metadata is None:
            raise ValueError(f"{path} is no checkpoint of Orbax; is the copy complete?")
        self._check(_shapes(wanted), _shapes(saved.item_metadata))
        return _with_keys_of(abstract, checkpointer.restore(path, wanted))

    def _check(self, wanted: dict[str, tuple], saved: dict[str, tuple]) -> None:
        """Before Orbax, which would say it of whatever array it came to first."""
        for name in sorted(wanted.keys() | saved.keys()):
            if wanted.get(name) != saved.get(name):
                raise ValueError(
                    f"{self.source}: {CONFIG_FILE} describes {name} of shape {wanted.get(name)}, "
                    f"{PARAMS} has {saved.get(name)}; they are not of one model"
                )

    def close(self) -> None:
        """Nothing is held open."""


def save_checkpoint(
    directory: str | os.PathLike, params: dict, config: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Writes a model that `LLM(directory)` loads; all of it or nothing.

    Args:
        directory: is not there yet, or is empty.
        params: nested dicts of arrays, as `nnx.to_pure_dict` gives a decoder's.
        config: the decoder's; its `dtype` becomes that of the parameters.
        tokenizer: the model's, where it has one.

    Raises:
        ValueError: there is something in `directory`.
    """
    directory = pathlib.Path(directory).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty; name a directory that is not there yet")
    directory.parent.mkdir(parents=True, exist_ok=True)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    fields = dataclasses.asdict(dataclasses.replace(config, dtype=dtype))
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        made = pathlib.Path(folder, directory.name)
        made.mkdir()
        checkpointer = _checkpointer()
        checkpointer.save(made / PARAMS, _with_text_keys(params))
        checkpointer.wait_until_finished()
        (made / PARAMS / "commit_success.txt").unlink(missing_ok=True)  # names the folder it was in
        (made / CONFIG_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, made)
        made.rename(directory)


def _checkpointer() -> "ocp.StandardCheckpointer":
    """Orbax's, imported now: it takes as long as JAX does."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # of each array's layout and of each file
    return ocp.StandardCheckpointer()


def _read_config(path: pathlib.Path) -> ModelConfig:
    fields = read_json(path)
    try:
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        for name in ("layer_windows", "eos_token_ids"):
            fields[name] = tuple(fields[name])
        return ModelConfig(**fields)
    except (KeyError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(ModelConfig))
        raise ValueError(
            f"{path} must have the fields {names} and no others: {error}; save it anew"
        ) from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: dict) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def _with_text_keys(tree: Any) -> Any:
    """Layers are numbered by integers; a file's names are text."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_text_keys(inner) for key, inner in tree.items()}


def _with_keys_of(like: Any, tree: Any) -> Any:
    if not isinstance(like, dict):
        return tree
    return {key: _with_keys_of(inner, tree[str(key)]) for key, inner in like.items()}
