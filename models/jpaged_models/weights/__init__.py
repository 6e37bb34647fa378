"""Checkpoints: a config, a tokenizer and named host arrays, from a directory, a GGUF or the hub."""

from jpaged_models.weights.checkpoint import (
    DEFAULT_MODEL,
    TINY,
    Checkpoint,
    NamedTensors,
    open_checkpoint,
    open_named_tensors,
)
from jpaged_models.weights.orbax import OrbaxCheckpoint, save_checkpoint

__all__ = [
    "DEFAULT_MODEL",
    "TINY",
    "Checkpoint",
    "NamedTensors",
    "OrbaxCheckpoint",
    "open_checkpoint",
    "open_named_tensors",
    "save_checkpoint",
]
