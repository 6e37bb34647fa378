"""Checkpoints of our own: a directory in which Orbax keeps parameters as the decoder holds them.

jpaged.json      the fields of ModelConfig
params/          what Orbax saved, a tree of the decoder's parameters
tokenizer.json, tokenizer_config.json, chat_template.jinja    where the model has them
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jpaged_models.config import ModelConfig
from jpaged_models.rope import RopeScaling
from jpaged_models.tokenizer import Tokenizer, read_json, save_tokenizer, tokenizer_in

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

CONFIG_FILE = "jpaged.json"
PARAMS = "params"
PART_BYTES = 8 << 20  # read at a time, at least,
MAX_PARTS = 16  # and about as many times at most: each costs 30 ms

Keys = tuple[str, ...]  # from a tree's root to a leaf


class OrbaxCheckpoint:
    """A directory that `save_checkpoint` has written."""

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
        wanted = _flat(abstract)
        restored: dict = {}
        with _quiet_checkpointer() as checkpointer:
            saved: Any = checkpointer.metadata(path).item_metadata
            if saved is None:
                raise ValueError(f"{path} is no checkpoint of Orbax; is the copy complete?")
            self._check(wanted, _flat(saved.tree))
            for part in parts(wanted, least_bytes=PART_BYTES, most_parts=MAX_PARTS):
                restored |= self._restored(checkpointer, path, part)
        by_own_keys = {keys: restored[_text(keys)] for keys in flatten_dict(abstract)}
        return unflatten_dict(by_own_keys)

    def _restored(
        self, checkpointer: "ocp.PyTreeCheckpointer", path: pathlib.Path, part: dict[Keys, Any]
    ) -> dict[Keys, Array]:
        try:
            return _restore(checkpointer, path, part)
        except Exception as error:  # of Orbax, TensorStore or the system
            first_line = str(error).partition("\n")[0]
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {first_line:.200}); is the copy "
                "complete?"
            ) from error

    def _check(self, wanted: dict[Keys, Any], saved: dict[Keys, Any]) -> None:
        """Before Orbax, which would say it of whatever array it came to first."""
        for keys in sorted(wanted.keys() | saved.keys()):
            shapes = [tuple(of[keys].shape) if keys in of else None for of in (wanted, saved)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{self.source}: {CONFIG_FILE} describes {'.'.join(keys)} of shape "
                    f"{shapes[0]}, {PARAMS} has {shapes[1]}; they are not of one model"
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
        ValueError: there is something in `directory`, or it is a file.
    """
    directory = pathlib.Path(directory).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "not empty" if directory.is_dir() else "a file"
        raise ValueError(f"{directory} is {what}; name a directory that is not there yet")
    directory.parent.mkdir(parents=True, exist_ok=True)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    fields = dataclasses.asdict(dataclasses.replace(config, dtype=dtype))
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        made = pathlib.Path(folder, directory.name)
        made.mkdir()
        with _quiet_checkpointer() as checkpointer:
            checkpointer.save(made / PARAMS, unflatten_dict(_flat(params)))
        (made / PARAMS / "commit_success.txt").unlink(missing_ok=True)  # names the folder it was in
        (made / CONFIG_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, made)
        made.rename(directory)


@contextlib.contextmanager
def _quiet_checkpointer() -> Iterator["ocp.PyTreeCheckpointer"]:
    """Orbax's, without its log of each array's layout and of each file.

    Imported now: it takes as long as JAX does.
    """
    import orbax.checkpoint as ocp

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield ocp.PyTreeCheckpointer()
    finally:
        log.setLevel(level)


def parts(
    specs: dict[Keys, Any], *, least_bytes: int, most_parts: int
) -> Iterator[dict[Keys, Any]]:
    """What Orbax reads at a time: it holds a part three times over, as stored, read and placed.

    The largest parameters come first, while little else is in memory yet.

    Args:
        specs: shapes and dtypes.
        least_bytes: parts hold up to so many bytes,
        most_parts: or up to this fraction of all; a parameter that is larger is a part by itself.
    """
    sizes = {keys: spec.size * spec.dtype.itemsize for keys, spec in specs.items()}
    room = max(least_bytes, sum(sizes.values()) // most_parts)
    part: dict[Keys, Any] = {}
    held = 0
    for keys in sorted(specs, key=lambda keys: sizes[keys], reverse=True):
        if part and held + sizes[keys] > room:
            yield part
            part, held = {}, 0
        part[keys] = specs[keys]
        held += sizes[keys]
    yield part


def _restore(
    checkpointer: "ocp.PyTreeCheckpointer", path: pathlib.Path, part: dict[Keys, Any]
) -> dict[Keys, Array]:
    """Some of the parameters, on the default device."""
    import orbax.checkpoint as ocp

    wanted = unflatten_dict({keys: _placed(spec) for keys, spec in part.items()})
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
    restored: dict = flatten_dict(checkpointer.restore(path, args=args))
    return restored


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


def _flat(tree: dict) -> dict[Keys, Any]:
    """By the keys of a file, which are text; layers are numbered by integers."""
    return {_text(keys): leaf for keys, leaf in flatten_dict(tree).items()}


def _text(keys: tuple) -> Keys:
    return tuple(map(str, keys))
