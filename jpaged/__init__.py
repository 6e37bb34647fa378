"""A paged-attention serving engine in JAX and Pallas."""

from typing import TYPE_CHECKING, Any

from jpaged.generate import generate, shutdown

if TYPE_CHECKING:
    from jpaged.async_llm import AsyncLLM
    from jpaged.beams import BeamSearchParams
    from jpaged.chrome_trace import save_trace
    from jpaged.errors import EngineFailedError, JpagedError, OutOfBlocksError, QueueFullError
    from jpaged.llm import LLM
    from jpaged.outputs import CompletionOutput, Logprob, RequestOutput
    from jpaged.params import SamplingParams
    from jpaged.picture import show
    from jpaged.snapshot import Snapshot
    from jpaged.stats import Stats

__version__ = "0.1.0"

_HOMES = {  # loaded when first used: importing jpaged loads no flax and touches no device
    "AsyncLLM": "jpaged.async_llm",
    "BeamSearchParams": "jpaged.beams",
    "CompletionOutput": "jpaged.outputs",
    "EngineFailedError": "jpaged.errors",
    "JpagedError": "jpaged.errors",
    "LLM": "jpaged.llm",
    "Logprob": "jpaged.outputs",
    "OutOfBlocksError": "jpaged.errors",
    "QueueFullError": "jpaged.errors",
    "RequestOutput": "jpaged.outputs",
    "SamplingParams": "jpaged.params",
    "Snapshot": "jpaged.snapshot",
    "Stats": "jpaged.stats",
    "save_trace": "jpaged.chrome_trace",
    "show": "jpaged.picture",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineFailedError",
    "JpagedError",
    "Logprob",
    "OutOfBlocksError",
    "QueueFullError",
    "RequestOutput",
    "SamplingParams",
    "Snapshot",
    "Stats",
    "generate",
    "save_trace",
    "show",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jpaged' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
