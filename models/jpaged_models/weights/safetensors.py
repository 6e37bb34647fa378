"""Checkpoints in Hugging Face's layout: config.json beside one or many safetensors files."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from jpaged_models.config import ModelConfig, config_from_hf
from jpaged_models.tokenizer import Tokenizer, read_json, tokenizer_in

INDEX = "model.safetensors.index.json"
# Tables that old Transformers versions saved beside the weights and every model recomputes.
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


class SafetensorsCheckpoint:
    """A directory of safetensors files, opened and checked at once and read tensor by tensor."""

    def __init__(self, directory: pathlib.Path, *, source: str) -> None:
        self.directory = directory
        self.source = source
        self.config = _read_config(directory)
        self._files = {path: _open(path) for path in _weight_files(directory)}
        places = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        _check_index(directory, places)
        self._places = _full_names(places, self.config)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The directory's tokenizer, or None. Raises ValueError for one that cannot be read."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_in(self.directory, self.config)
        return self._tokenizer

    def names(self) -> frozenset[str]:
        """The name of every tensor."""
        return frozenset(self._places)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in the dtype it was saved in."""
        if name not in self._places:
            raise ValueError(f"{self.source} has no tensor {name!r}")
        if not self._files:
            raise ValueError(f"{self.source} is closed")
        path, stored_name = self._places[name]
        return self._files[path].get_tensor(stored_name)

    def close(self) -> None:
        """Lets go of the files."""
        self._files = {}


def _read_config(directory: pathlib.Path) -> ModelConfig:
    raw = read_json(directory / "config.json")
    if not raw:
        raise ValueError(
            f"{directory} has no config.json; pass a directory in Hugging Face's layout or a "
            f".gguf file{_hint(directory)}"
        )
    return config_from_hf(raw, read_json(directory / "generation_config.json"))


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """model.safetensors, or the shards that the index names, every one of them there."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(set(_weight_map(directory).values()))
    if not shards:
        raise ValueError(
            f"{directory} has neither model.safetensors nor {INDEX}; only safetensors and GGUF "
            f"weights are read{_hint(directory)}"
        )
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory / INDEX} names {len(shards)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing)}; download them again"
        )
    return [directory / name for name in shards]


def _hint(directory: pathlib.Path) -> str:
    """What to pass instead, where the directory holds a GGUF file."""
    found = sorted(directory.glob("*.gguf"))
    return f"; it holds a GGUF file, so pass {found[0]}" if found else ""


def _weight_map(directory: pathlib.Path) -> Mapping[str, str]:
    weight_map = read_json(directory / INDEX).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensor names to file names")  # noqa: TRY004
    return weight_map


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(str(path), framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error


def _check_index(directory: pathlib.Path, places: Mapping[str, pathlib.Path]) -> None:
    if (directory / "model.safetensors").is_file():
        return
    lost = [name for name in _weight_map(directory) if name not in places]
    if lost:
        raise ValueError(
            f"{directory / INDEX} names {len(lost)} tensors that no shard holds, {lost[0]!r} for "
            "one; the shards and the index are not of one download"
        )


def _full_names(
    places: Mapping[str, pathlib.Path], config: ModelConfig
) -> dict[str, tuple[pathlib.Path, str]]:
    """Names as the whole model has them: a file saved from its body alone lacks the prefix."""
    prefix = "transformer." if config.architecture == "GPT2LMHeadModel" else "model."
    bare = not any(name.startswith(prefix) for name in places)
    full: dict[str, tuple[pathlib.Path, str]] = {}
    for name, path in places.items():
        if not BUFFERS.search(name):
            full[prefix + name if bare and name != "lm_head.weight" else name] = (path, name)
    return full
