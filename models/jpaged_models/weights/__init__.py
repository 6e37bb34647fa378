"""Checkpoints: a config, a tokenizer and named host arrays, from a directory, a GGUF or the hub."""

from jpaged_models.weights.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint

__all__ = ["DEFAULT_MODEL", "Checkpoint", "open_checkpoint"]
