"""What `LLM` is made with, checked before anything is loaded."""

import dataclasses
import os

import numpy as np

from jpaged.config import EngineConfig
from jpaged.params import checked_flag, checked_float, checked_seed, checked_text

DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_DEFAULT = 8192  # a model's context may be far longer than anyone here will use
DEFAULT_MEMORY_FRACTION = 0.9
MAX_SWAP_SPACE = 2.0**20  # GiB: no machine has more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `LLM`, which explains them and holds their defaults.

    `memory_fraction` is a number once this is made, under whichever name it was given.
    """

    model: str | os.PathLike | None
    revision: str | None
    dtype: str
    block_size: int
    num_blocks: int | None
    memory_fraction: float | None
    gpu_memory_utilization: dataclasses.InitVar[float | None]
    swap_space: float
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    max_model_len: int | None
    max_waiting: int
    seed: int
    enable_prefix_caching: bool
    async_scheduling: bool
    attention_backend: str
    warm_up: bool
    use_tqdm: bool

    def __post_init__(self, gpu_memory_utilization: float | None) -> None:
        if self.model is not None and not isinstance(self.model, str | os.PathLike):
            raise TypeError(f"model must be a path, a hub id or None, got {self.model!r}")
        if self.revision is not None:
            checked_text("revision", self.revision)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        checked_text("attention_backend", self.attention_backend)
        fraction = _memory_fraction(self.memory_fraction, gpu_memory_utilization)
        object.__setattr__(self, "memory_fraction", fraction)
        swap_space = checked_float("swap_space", self.swap_space, least=0.0, most=MAX_SWAP_SPACE)
        object.__setattr__(self, "swap_space", swap_space)
        object.__setattr__(self, "seed", checked_seed(self.seed))
        for name in ("warm_up", "use_tqdm"):
            checked_flag(name, getattr(self, name))
        # For its checks, on which neither platform nor model have a say.
        self.limits(platform="cpu", longest=LONGEST_DEFAULT)

    def limits(self, *, platform: str, longest: int) -> EngineConfig:
        """The engine's limits on a platform, for a model whose context is `longest` tokens."""
        on_cpu = platform == "cpu"
        return EngineConfig(
            block_size=self.block_size,
            num_blocks=_or(self.num_blocks, 2),  # replaced when memory is known
            max_num_seqs=_or(self.max_num_seqs, 64 if on_cpu else 256),
            max_num_batched_tokens=_or(self.max_num_batched_tokens, 256 if on_cpu else 2048),
            max_model_len=_or(self.max_model_len, min(longest, LONGEST_DEFAULT)),
            max_waiting=self.max_waiting,
            enable_prefix_caching=self.enable_prefix_caching,
            async_scheduling=self.async_scheduling,
        )


def _dtype_name(value: object) -> str:
    """The name of a dtype, or "auto"; `jnp.bfloat16` and NumPy's own will do."""
    is_dtype = isinstance(value, type | np.dtype)
    name = np.dtype(value).name if is_dtype else checked_text("dtype", value)
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {name!r}")
    return name


def _memory_fraction(given: float | None, given_as_vllm: float | None) -> float:
    if given is not None and given_as_vllm is not None:
        raise ValueError(
            "memory_fraction and gpu_memory_utilization are two names of one option; give one"
        )
    name = "memory_fraction" if given_as_vllm is None else "gpu_memory_utilization"
    value = next((v for v in (given, given_as_vllm) if v is not None), DEFAULT_MEMORY_FRACTION)
    fraction = checked_float(name, value, least=0.0, most=1.0)
    if fraction == 0.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got 0")
    return fraction


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
