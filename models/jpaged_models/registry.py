"""Architecture name to decoder: what can be loaded, and how its weights are laid out."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged_models.config import ModelConfig
from jpaged_models.context import Pools, StepContext
from jpaged_models.gpt2 import GPT2, gpt2_weights
from jpaged_models.llama import Llama, llama_weights
from jpaged_models.weights import Checkpoint, NamedTensors, OrbaxCheckpoint


@runtime_checkable  # the shape checker of the tests asks isinstance
class Decoder(Protocol):
    """What the engine asks of a network."""

    config: ModelConfig

    def __call__(
        self, tokens: Int32[Array, " T"], pools: Pools, context: StepContext
    ) -> tuple[Float[Array, "T D"], Pools]:
        """Hidden states before the head, and the pools with the step's keys and values."""
        ...

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Logits in float32 of hidden states."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder class, and the layout of its weights in a Hugging Face checkpoint."""

    module: Callable[..., Any]
    weights: Callable[[ModelConfig, Callable[[str], np.ndarray]], dict]


_LLAMA = Family(Llama, llama_weights)
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Family(GPT2, gpt2_weights),
}


def abstract_decoder(config: ModelConfig, *, dtype: DTypeLike) -> Decoder:
    """A decoder whose parameters are shapes: to load into, or to compile without weights."""
    module = FAMILIES[config.architecture].module
    return cast(Decoder, nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=None)))


def random_decoder(config: ModelConfig, *, dtype: DTypeLike, seed: int) -> Decoder:
    """A decoder with weights drawn from N(0, 0.02)."""
    module = FAMILIES[config.architecture].module
    return cast(Decoder, module(config, dtype=dtype, rngs=nnx.Rngs(seed)))


def load_decoder(checkpoint: Checkpoint, *, dtype: DTypeLike) -> Decoder:
    """The checkpoint's decoder on the default device, in `dtype`.

    Raises:
        ValueError: a tensor is missing or has another shape than the config says.
    """
    graph, abstract = nnx.split(abstract_decoder(checkpoint.config, dtype=dtype))
    wanted = nnx.to_pure_dict(abstract)
    if isinstance(checkpoint, OrbaxCheckpoint):
        placed = checkpoint.restore(wanted)
    else:
        placed = _place(wanted, _named_weights(checkpoint), dtype, path=())
    nnx.replace_by_pure_dict(abstract, placed)
    return cast(Decoder, nnx.merge(graph, abstract))


def params_of(decoder: Decoder) -> dict:
    """The decoder's parameters as nested dicts of arrays, as `save_checkpoint` takes them."""
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


def _named_weights(checkpoint: NamedTensors) -> dict:
    """What Hugging Face's names hold, laid out as the decoder's parameters are."""
    config, names = checkpoint.config, checkpoint.names()

    def read(name: str) -> np.ndarray:
        if name not in names:
            raise ValueError(
                f"{checkpoint.source}: tensor {name!r} is missing for a {config.architecture}; "
                f"found {len(names)} tensors, such as {sorted(names)[:3]}; "
                "is the download complete?"
            )
        return checkpoint.tensor(name)

    return FAMILIES[config.architecture].weights(config, read)


def _place(wanted: dict, found: dict, dtype: DTypeLike, path: tuple) -> dict:
    """Host arrays moved to the device leaf by leaf, each checked against the shape wanted."""
    placed = {}
    for key, leaf in wanted.items():
        if isinstance(leaf, dict):
            inner: Any = found[key]
            inner = inner() if callable(inner) else inner
            placed[key] = _place(leaf, inner, dtype, (*path, key))
            continue
        if found[key].shape != leaf.shape:
            name = ".".join(map(str, (*path, key)))
            raise ValueError(
                f"{name}: expected shape {leaf.shape}, got {found[key].shape}; "
                "the config does not belong to these weights"
            )
        # No name keeps the host's copy: it is gone before the next is read.
        placed[key] = jax.device_put(np.ascontiguousarray(found.pop(key)).astype(dtype))
    return placed
