"""What callers pass as prompts, checked and made into requests before anything runs."""

import collections.abc
import itertools
import numbers
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeVar

import numpy as np

from jpaged.bad_words import WordIds, most_forbidden, word_ids
from jpaged.batch import MAX_STOP_IDS, stop_ids
from jpaged.beams import MAX_CANDIDATES, BeamSearchParams, start_search
from jpaged.params import SamplingParams, checked_int, checked_text
from jpaged.requests import Request
from jpaged.shape_batch import MAX_FORBIDDEN
from jpaged_models import ModelConfig, Tokenizer

Prompt = str | SequenceOf[int] | np.ndarray
_Params = TypeVar("_Params", SamplingParams, BeamSearchParams)


class RequestMaker:
    """Makes requests of prompts; draws the seed and the id of those that bring none."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer | None, *, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._seeds = np.random.default_rng(seed % 2**64)
        self._ids = itertools.count()

    def make(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Request:
        """A request, or ValueError or TypeError that says what is wrong with the prompt."""
        token_ids = self._token_ids(prompt)
        text = prompt if isinstance(prompt, str) else None
        return self.make_tokenized(token_ids, params, text, priority)

    def make_tokenized(
        self, token_ids: list[int], params: SamplingParams, prompt: str | None, priority: int = 0
    ) -> Request:
        """A request of token ids that were checked already."""
        held_back = stop_ids(params, self.model.eos_token_ids)
        if params.min_tokens and len(held_back) > MAX_STOP_IDS:
            raise ValueError(
                f"min_tokens can hold back at most {MAX_STOP_IDS} stop ids, the model's eos ids "
                f"included; got {len(held_back)}"
            )
        words = word_ids(params.bad_words, self.tokenizer)
        self._check_vocabulary("stop token id", params.stop_token_ids)
        self._check_vocabulary("logit_bias of token id", params.logit_bias or ())
        self._check_vocabulary("allowed token id", params.allowed_token_ids or ())
        self._check_vocabulary("bad word's token id", itertools.chain.from_iterable(words))
        self._check_something_is_left(params, words)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer and this model has none")
        return Request(
            request_id="",
            prompt=prompt,
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed or 0,
            priority=priority,
            bad_word_ids=words,
        )

    def make_beams(
        self, prompt: Prompt, params: BeamSearchParams, priority: int = 0, *, max_model_len: int
    ) -> Request:
        """A request whose answers a beam search finds."""
        request = self.make(prompt, params.sampling_params, priority)
        request.search = search = start_search(
            params,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_model_len=max_model_len,
            eos_token_ids=self.model.eos_token_ids,
        )
        most = min(MAX_CANDIDATES, self.model.vocab_size)
        if search.num_candidates > most:
            raise ValueError(
                f"beam_width={params.beam_width} and {len(search.end_ids)} token ids that end a "
                f"sequence are {search.num_candidates} together, and may be {most}; lower either"
            )
        return request

    def complete(self, request: Request, is_taken: Callable[[str], bool]) -> None:
        """Draws what the request's caller left out: an id that no other has, a seed.

        Not before all of a call's requests are found good, so that what is refused changes
        nobody's noise.
        """
        if not request.request_id:
            numbers_left = map(str, self._ids)
            request.request_id = next(name for name in numbers_left if not is_taken(name))
        if request.params.seed is None:
            request.seed = int(self._seeds.integers(2**63))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids, at least one."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer (no tokenizer.json, or no vocabulary in its GGUF "
                "file); pass token ids instead of text"
            )
        check_prompt(text)
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise ValueError(f"the prompt {text!r} has no tokens; expected at least one")
        return token_ids

    def _check_vocabulary(self, what: str, token_ids: Iterable[int]) -> None:
        size = self.model.vocab_size
        for token in token_ids:
            if not 0 <= token < size:
                raise ValueError(f"{what} {token} is outside the vocabulary of {size}")

    def _check_something_is_left(self, params: SamplingParams, words: WordIds) -> None:
        """Raises where bad words need more room than a row has, or might forbid every token."""
        if most_forbidden(words) > MAX_FORBIDDEN:
            raise ValueError(
                f"bad_words can forbid at most {MAX_FORBIDDEN} tokens behind any one token, "
                f"got {most_forbidden(words)}; give fewer that differ in their last token alone"
            )
        held_back = stop_ids(params, self.model.eos_token_ids) if params.min_tokens else ()
        last = {word[-1] for word in words}.union(held_back)
        allowed = params.allowed_token_ids
        num_left = self.model.vocab_size - len(last) if allowed is None else len({*allowed} - last)
        if num_left == 0:
            raise ValueError(
                "bad_words and min_tokens may forbid every one of allowed_token_ids; allow a token "
                "that ends no bad word and no sequence"
            )

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.encode(prompt)
        check_prompt(prompt)
        token_ids = [int(token) for token in prompt]
        self._check_vocabulary("token id", token_ids)
        return token_ids


def check_prompt(prompt: Any) -> None:
    """Raises ValueError or TypeError for what no model takes as a prompt."""
    if not isinstance(prompt, str) and not _is_sequence(prompt):
        raise TypeError(f"a prompt is text or a list of token ids, got {type(prompt).__name__}")
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; expected text or token ids")
    if isinstance(prompt, str):
        checked_text("a prompt", prompt)
        return
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise TypeError(
                f"a prompt is text or a list of token ids, which are integers; got "
                f"{token!r:.40} of type {type(token).__name__} in the list"
            )


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if not _is_sequence(prompts):
        raise TypeError(
            f"prompts are text, a list of token ids or a list of either, "
            f"got {type(prompts).__name__}"
        )
    if len(prompts) == 0:
        raise ValueError("the list of prompts is empty; expected at least one prompt")
    if is_single(prompts):
        return [prompts]
    return list(prompts)


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt: text, or token ids."""
    if isinstance(prompts, str):
        return True
    return _is_sequence(prompts) and any(isinstance(p, numbers.Number) for p in prompts)


def as_params(
    params: SamplingParams | SequenceOf[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """One `SamplingParams` for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [one_params(params)] * count
    return _one_each(params, count, SamplingParams, "SamplingParams, a list of them or None")


def as_beam_params(
    params: BeamSearchParams | SequenceOf[BeamSearchParams], count: int
) -> list[BeamSearchParams]:
    """One `BeamSearchParams` for each of `count` prompts."""
    if isinstance(params, BeamSearchParams):
        return [params] * count
    return _one_each(params, count, BeamSearchParams, "BeamSearchParams or a list of them")


def one_params(params: SamplingParams | None) -> SamplingParams:
    """The parameters of one prompt, by default all defaults."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise TypeError(f"expected SamplingParams or None, got {type(params).__name__}")
    return params


def as_priorities(priority: int | SequenceOf[int] | None, count: int) -> list[int]:
    """One priority for each of `count` prompts, 0 where none is given; lower ones run first."""
    if priority is None:
        return [0] * count
    if isinstance(priority, str) or not _is_sequence(priority):
        return [checked_priority(priority)] * count
    each: Any = priority
    if len(each) != count:
        raise ValueError(f"got {count} prompts and {len(each)} priorities; give one for each")
    return [checked_priority(one) for one in each]


def checked_priority(priority: object) -> int:
    """`priority` as an int, or an error that says what it is."""
    return checked_int("priority", priority, least=-(2**63), most=2**63 - 1)


def _one_each(params: Any, count: int, kind: type[_Params], expected: str) -> list[_Params]:
    if not _is_sequence(params) or isinstance(params, str):
        raise TypeError(f"expected {expected}, got {type(params).__name__}")
    for one in params:
        if not isinstance(one, kind):
            raise TypeError(f"expected {kind.__name__} for each prompt, got {type(one).__name__}")
    if len(params) != count:
        raise ValueError(
            f"got {count} prompts and {len(params)} {kind.__name__}; give one for each"
        )
    return list(params)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    is_bytes = isinstance(value, bytes | bytearray | memoryview)
    return isinstance(value, collections.abc.Sequence) and not is_bytes
