"""The networks: decoder definitions and the loading of their weights and tokenizers."""

from jpaged_models.chat_template import ChatTemplate
from jpaged_models.config import DTYPES, ModelConfig, config_from_hf
from jpaged_models.context import Phase, Pools, StepContext
from jpaged_models.registry import (
    FAMILIES,
    Decoder,
    abstract_decoder,
    load_decoder,
    params_of,
    random_decoder,
)
from jpaged_models.rope import RopeScaling
from jpaged_models.tokenizer import Tokenizer
from jpaged_models.weights import (
    DEFAULT_MODEL,
    TINY,
    Checkpoint,
    NamedTensors,
    open_checkpoint,
    open_named_tensors,
    save_checkpoint,
)

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "FAMILIES",
    "TINY",
    "ChatTemplate",
    "Checkpoint",
    "Decoder",
    "ModelConfig",
    "NamedTensors",
    "Phase",
    "Pools",
    "RopeScaling",
    "StepContext",
    "Tokenizer",
    "abstract_decoder",
    "config_from_hf",
    "load_decoder",
    "open_checkpoint",
    "open_named_tensors",
    "params_of",
    "random_decoder",
    "save_checkpoint",
]
