"""How a request's tokens are chosen, and when they end."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

MAX_LOGPROBS = 20  # the width of the device's top-k for logprobs, fixed so that no request sets it
MIN_TEMPERATURE = 1e-6  # below it logits / temperature may overflow float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """vLLM's names and defaults; every value is checked when the object is made.

    `temperature` 0 means greedy, `top_k` 0 or -1 and `max_tokens` None mean no limit of their own.
    Stops count only after `min_tokens` tokens. `stop` takes one string or several. Requests share
    cached prefixes only where their `cache_salt` is the same, so that nobody can learn from the
    time of an answer what others asked.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": checked_int("n", self.n, least=1),
            "temperature": _checked_temperature(self.temperature),
            "top_p": checked_float("top_p", self.top_p, least=0.0, most=1.0),
            "top_k": max(checked_int("top_k", self.top_k, least=-1), 0),
            "min_p": checked_float("min_p", self.min_p, least=0.0, most=1.0),
            "stop": _checked_stop(self.stop),
            "stop_token_ids": _checked_token_ids(self.stop_token_ids),
            "min_tokens": checked_int("min_tokens", self.min_tokens, least=0),
        }
        if self.seed is not None:
            seed = checked_int("seed", self.seed, least=-(2**63), most=2**64 - 1)
            checked["seed"] = seed
        if self.max_tokens is not None:
            checked["max_tokens"] = checked_int("max_tokens", self.max_tokens, least=1)
        if self.logprobs is not None:
            logprobs = checked_int("logprobs", self.logprobs, least=0, most=MAX_LOGPROBS)
            checked["logprobs"] = logprobs
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise TypeError(f"cache_salt must be a string or None, got {self.cache_salt!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no noise is needed."""
        return self.temperature == 0.0

    def _check_together(self) -> None:
        if self.top_p == 0.0:
            raise ValueError(
                "top_p must be above 0 and at most 1, got 0; for greedy set temperature=0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens, got {self.min_tokens} > {self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are found in text: they need detokenize=True")


_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize")


def checked_int(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """`value` as an int between `least` and `most`, or an error that names what was expected."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def checked_float(name: str, value: object, *, least: float, most: float = math.inf) -> float:
    """`value` as a finite float between `least` and `most`, or an error that says what was not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if not least <= number <= most:
        expected = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def _checked_temperature(value: object) -> float:
    temperature = checked_float("temperature", value, least=0.0)
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {temperature}"
        )
    return temperature


def _checked_stop(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise TypeError(f"stop must be a string or a list of strings, got {value!r}")
    if not all(strings):
        raise ValueError(f"stop strings must not be empty, got {value!r}")
    return tuple(strings)


def _checked_token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"stop_token_ids must be a list of ints, got {value!r}")
    return tuple(checked_int("each of stop_token_ids", token, least=0) for token in value)
