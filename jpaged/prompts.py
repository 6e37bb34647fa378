"""What callers pass as prompts, checked and made into requests before anything runs."""

import collections.abc
import itertools
import numbers
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from jpaged.bad_words import WordIds, most_forbidden, word_ids
from jpaged.batch import MAX_STOP_IDS, stop_ids
from jpaged.params import SamplingParams
from jpaged.requests import Request
from jpaged.shape_batch import MAX_FORBIDDEN
from jpaged_models import ModelConfig, Tokenizer

Prompt = str | SequenceOf[int]


class RequestMaker:
    """Makes requests of prompts; draws a seed where none is given, and numbers the requests."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer | None, *, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._seeds = np.random.default_rng(seed % 2**64)
        self._ids = itertools.count()

    def make(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request, or ValueError or TypeError that says what is wrong with the prompt."""
        token_ids = self._token_ids(prompt)
        return self.make_tokenized(token_ids, params, prompt if isinstance(prompt, str) else None)

    def make_tokenized(
        self, token_ids: list[int], params: SamplingParams, prompt: str | None
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
        seed = params.seed
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        return Request(
            request_id=str(next(self._ids)),
            prompt=prompt,
            prompt_token_ids=token_ids,
            params=params,
            seed=seed,
            bad_word_ids=words,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids, at least one."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; pass token ids instead of text")
        if not text:
            raise ValueError("the prompt is empty; expected text or token ids")
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise ValueError(f"the prompt {text!r} has no tokens; expected at least one")
        return token_ids

    def _check_vocabulary(self, what: str, token_ids: Iterable[int]) -> None:
        size = self.model.vocab_size
        for token in token_ids:
            if token >= size:
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
        if not _is_sequence(prompt):
            raise TypeError(f"a prompt is text or a list of token ids, got {type(prompt).__name__}")
        if len(prompt) == 0:
            raise ValueError("the prompt is empty; expected text or token ids")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, numbers.Integral):
                raise TypeError(f"token ids are integers, got {token!r}")
            if not 0 <= token < self.model.vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary of {self.model.vocab_size}"
                )
        return [int(token) for token in prompt]


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
        return [params or SamplingParams()] * count
    each = list(params)
    for one in each:
        if not isinstance(one, SamplingParams):
            raise TypeError(f"expected SamplingParams, got {type(one).__name__}")
    if len(each) != count:
        raise ValueError(f"got {count} prompts and {len(each)} SamplingParams; give one for each")
    return each


def _is_sequence(value: Any) -> bool:
    return isinstance(value, collections.abc.Sequence | np.ndarray) and not isinstance(value, bytes)
