"""How a request's tokens are chosen, and when they end."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_LOGPROBS = 20  # the width of the device's top-k for logprobs, fixed so that no request sets it
MAX_SEQUENCES = 16_384  # of a request: all of them are made before the queue can refuse them
MAX_TOKENS = 2**30  # what the device is told of lengths stays below 2**31, a prompt added
MIN_TEMPERATURE = 1e-6  # below it logits / temperature may overflow float32
MAX_TEMPERATURE = 1e6  # its inverse: far beyond it temperature itself overflows float32
MAX_REPETITION_PENALTY = 100.0  # and its inverse the least: no logit overflows, none is lost
MAX_LOGIT_BIAS = 100.0  # vLLM's and OpenAI's


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """vLLM's names and defaults; every value is checked when the object is made.

    `temperature` 0 means greedy, `top_k` 0 or -1 and `max_tokens` None mean no limit of their own.
    Stops count only after `min_tokens` tokens. `stop` takes one string or several. Requests share
    cached prefixes only where their `cache_salt` is the same, so that nobody can learn from the
    time of an answer what others asked.

    With `best_of`, so many sequences are drawn, and of these the `n` whose tokens have the highest
    cumulative log-probability are the answer, best first.

    What bends the logits, greedy or not, before temperature (definitions in `jpaged.shaping`):
    `presence_penalty` and `frequency_penalty` over the generated tokens, `repetition_penalty` over
    prompt and generated ones, `logit_bias` by token id, `allowed_token_ids` instead of the whole
    vocabulary, and `bad_words`, each text or token ids, which never come whole.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
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
            "n": checked_int("n", self.n, least=1, most=MAX_SEQUENCES),
            "temperature": _checked_temperature(self.temperature),
            "top_p": _checked_top_p(self.top_p),
            "top_k": max(checked_int("top_k", self.top_k, least=-1, most=MAX_TOKENS), 0),
            "min_p": checked_float("min_p", self.min_p, least=0.0, most=1.0),
            "presence_penalty": _checked_penalty("presence_penalty", self.presence_penalty),
            "frequency_penalty": _checked_penalty("frequency_penalty", self.frequency_penalty),
            "repetition_penalty": checked_float(
                "repetition_penalty",
                self.repetition_penalty,
                least=1 / MAX_REPETITION_PENALTY,
                most=MAX_REPETITION_PENALTY,
            ),
            "logit_bias": _checked_bias(self.logit_bias),
            "allowed_token_ids": _checked_allowed(self.allowed_token_ids),
            "bad_words": _checked_bad_words(_or_empty(self.bad_words)),
            "stop": _checked_stop(_or_empty(self.stop)),
            "stop_token_ids": checked_token_ids("stop_token_ids", _or_empty(self.stop_token_ids)),
            "min_tokens": checked_int("min_tokens", self.min_tokens, least=0, most=MAX_TOKENS),
        }
        if self.best_of is not None:
            checked["best_of"] = checked_int("best_of", self.best_of, least=1, most=MAX_SEQUENCES)
        if self.seed is not None:
            checked["seed"] = checked_seed(self.seed)
        if self.max_tokens is not None:
            checked["max_tokens"] = checked_int("max_tokens", self.max_tokens, least=1)
        if self.logprobs is not None:
            logprobs = checked_int("logprobs", self.logprobs, least=0, most=MAX_LOGPROBS)
            checked["logprobs"] = logprobs
        if self.cache_salt is not None:
            checked["cache_salt"] = checked_text("cache_salt", self.cache_salt)
        for name in _FLAGS:
            checked_flag(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated, of which `n` are returned."""
        return self.best_of or self.n

    @property
    def ranks(self) -> bool:
        """Whether some of the sequences are left out, the least likely ones."""
        return self.num_sequences > self.n

    @property
    def num_logprobs(self) -> int | None:
        """Log-probabilities that a token needs beside its own; None where not even that one."""
        return 0 if self.logprobs is None and self.ranks else self.logprobs

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no noise is needed."""
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens came before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def shapes_logits(self) -> bool:
        """Whether anything but temperature and filters comes between the logits and the token."""
        forbids = self.allowed_token_ids is not None or bool(self.bad_words)
        return self.penalizes or self.logit_bias is not None or forbids

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of must be at least n, got {self.best_of} < {self.n}")
        if self.ranks and self.greedy:
            raise ValueError(
                f"best_of={self.best_of} draws sequences to choose from, and at temperature=0 they "
                "would all be the same; raise temperature, or leave best_of out"
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


def checked_float(name: str, value: object, *, least: float, most: float) -> float:
    """`value` as a finite float between `least` and `most`, or an error that says what was not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 300 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {number}")
    return number


def checked_flag(name: str, value: object) -> bool:
    """`value` as a bool, or an error that names what was expected."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )
    return value


def checked_seed(value: object) -> int:
    """`value` as a seed: 64 bits, with a sign or without."""
    return checked_int("seed", value, least=-(2**63), most=2**64 - 1)


def checked_text(name: str, value: object) -> str:
    """`value` as text that UTF-8 can write, or an error that says what it was."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} of type {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can write, got the lone surrogate "
            f"{value[error.start]!r} at {error.start}; decode bytes with errors='replace'"
        ) from None
    return value


def checked_token_ids(name: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of ints that are not negative, or an error that names what was."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    if not is_array and not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list of ints, got {value!r}")
    tokens: Any = value
    return tuple(checked_int(f"each of {name}", token, least=0) for token in tokens)


def _checked_top_p(value: object) -> float:
    number = checked_float("top_p", value, least=-math.inf, most=math.inf)
    if not 0 < number <= 1:
        raise ValueError(
            f"top_p must be above 0 and at most 1, got {number}; for greedy set temperature=0"
        )
    return number


def _checked_penalty(name: str, value: object) -> float:
    return checked_float(name, value, least=-2.0, most=2.0)


def _checked_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {value!r}")
    least, most = -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS
    biases = {
        checked_int("each token id of logit_bias", token, least=0): checked_float(
            f"logit_bias of token {token}", bias, least=least, most=most
        )
        for token, bias in value.items()
    }
    return biases or None


def _checked_allowed(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    token_ids = checked_token_ids("allowed_token_ids", value)
    if not token_ids:
        raise ValueError("allowed_token_ids must not be empty; None allows every token")
    return token_ids


def _or_empty(value: object) -> object:
    """A list that may be left out as None, as in vLLM."""
    return () if value is None else value


def _checked_bad_words(value: object) -> tuple[str | tuple[int, ...], ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        raise TypeError(f"bad_words must be a list of strings or of token ids, got {value!r}")
    name = "each of bad_words"
    checked = [
        checked_text(name, word) if isinstance(word, str) else checked_token_ids(name, word)
        for word in words
    ]
    if not all(word.strip() if isinstance(word, str) else word for word in checked):
        raise ValueError(f"bad_words must not be empty, got {value!r}")
    return tuple(checked)


def _checked_temperature(value: object) -> float:
    temperature = checked_float("temperature", value, least=0.0, most=MAX_TEMPERATURE)
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
    return tuple(checked_text("each of stop", string) for string in strings)
