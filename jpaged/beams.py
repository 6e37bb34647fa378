"""Beam search over one prompt: which beams go on, which have ended, and when to stop looking.

As Transformers' `GenerationMixin._beam_search` does it without sampling: a step ranks what all live
beams could become; what ends counts as finished only if it is among the first `beam_width`; a
finished one's score is its log-probability over its length to the power of `length_penalty`. No
device and no scheduler here: whoever holds the sequences brings candidates, and follows `parents`.
"""

import dataclasses
import operator
from collections.abc import Sequence as SequenceOf
from typing import Any, Literal, NamedTuple

from jpaged.params import SamplingParams, checked_float, checked_int

MAX_BEAM_WIDTH = 32
MAX_CANDIDATES = 2 * MAX_BEAM_WIDTH  # a beam's; the width of the device's top-k for beams
MAX_LENGTH_PENALTY = 10.0  # a million tokens to this power are far from the end of a float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """vLLM's names and defaults where it has them; every value is checked when the object is made.

    `beam_width` sequences are kept, and the `n` best are returned, by default all of them.
    `length_penalty` above 0 favours long ones. `early_stopping` False ends the search when the best
    live beam, at its present length, is worse than all of `beam_width` finished ones; True ends it
    as soon as there are so many; "never" looks on as long as the best could still come to more, at
    its longest where `length_penalty` favours that. One beam is greedy search, and ends where that
    does. Without `max_tokens` only the model's length ends a search. The others are those of
    `SamplingParams`.
    """

    beam_width: int
    max_tokens: int | None = 16
    n: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        width = checked_int("beam_width", self.beam_width, least=1, most=MAX_BEAM_WIDTH)
        checked: dict[str, Any] = {
            "beam_width": width,
            "length_penalty": checked_float(
                "length_penalty",
                self.length_penalty,
                least=-MAX_LENGTH_PENALTY,
                most=MAX_LENGTH_PENALTY,
            ),
        }
        if self.n is not None:
            checked["n"] = checked_int("n", self.n, least=1, most=width)
        _check_early_stopping(self.early_stopping)
        sampling = self._as_sampling(width)
        checked |= {name: getattr(sampling, name) for name in _SHARED}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def num_returned(self) -> int:
        """How many sequences the caller gets."""
        return self.beam_width if self.n is None else self.n

    @property
    def sampling_params(self) -> SamplingParams:
        """What the engine needs to know of the beams' sequences."""
        return self._as_sampling(self.beam_width)

    def _as_sampling(self, width: int) -> SamplingParams:
        shared = {name: getattr(self, name) for name in _SHARED}
        return SamplingParams(n=width, temperature=0, seed=0, **shared)


_SHARED = (  # with SamplingParams
    "max_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
    "cache_salt",
)


def _check_early_stopping(value: object) -> None:
    expected = f'early_stopping must be False, True or "never", got {value!r}'
    if not isinstance(value, bool | str):
        raise TypeError(expected)
    if isinstance(value, str) and value != "never":
        raise ValueError(expected)


Candidates = SequenceOf[tuple[int, float]]  # token ids with log-probabilities, likeliest first


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """What was generated so far: a token behind those of another beam."""

    before: "Beam | None" = dataclasses.field(repr=False)  # None: there is no token yet
    token: int
    logprob: float  # of all its tokens together
    num_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """All its tokens."""
        token_ids, beam = [], self
        while beam.before is not None:
            token_ids.append(beam.token)
            beam = beam.before
        return token_ids[::-1]


class Hypothesis(NamedTuple):
    """A beam that has ended."""

    beam: Beam
    score: float


class _Child(NamedTuple):
    """A token more for the live beam in the place `parent`."""

    logprob: float
    parent: int
    token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """A search as far as it has come; `advance` makes the next one and changes nothing.

    At first there is one of `live`, without a token; then always `beam_width`, until the search is
    over and there is none. `parents` are the places of what the live beams were one token ago: a
    beam that goes on stays in its place with the likeliest of its tokens, and the others take the
    places of those that do not go on. `finished` are the best so far.
    """

    params: BeamSearchParams
    end_ids: frozenset[int]  # tokens that end a beam
    max_tokens: int  # to generate: those of `params`, or what the model's length leaves
    live: tuple[Beam, ...] = (Beam(None, -1, 0.0, 0),)
    parents: tuple[int, ...] = ()
    finished: tuple[Hypothesis, ...] = ()

    @property
    def over(self) -> bool:
        """Whether `finished` is the answer, best first."""
        return not self.live

    @property
    def num_candidates(self) -> int:
        """Candidates that are looked at of each beam; the vocabulary must have as many.

        No more of one beam can go on, and none that ends and is likely enough is missed.
        Transformers takes the first (1 + len(end_ids)) * beam_width of all: to the same effect.
        """
        return self.params.beam_width + len(self.end_ids)

    def advance(self, candidates: SequenceOf[Candidates]) -> "BeamSearch":
        """The search one token later; `candidates` of each live beam, at least `num_candidates`."""
        children = self._ranked(candidates)
        width, num_tokens = self.params.beam_width, self.live[0].num_tokens + 1
        is_last = num_tokens == self.max_tokens
        going = [child for child in children if child.token not in self.end_ids][:width]
        assert len(going) == width, "of one beam alone, so many candidates do not end it"
        ended = [c for c in children[:width] if is_last or c.token in self.end_ids]
        found = (*self.finished, *(self._hypothesis(child, num_tokens) for child in ended))
        # Stable: of equals the one that was there stays.
        finished = tuple(sorted(found, key=lambda h: h.score, reverse=True)[:width])
        if is_last or self._is_settled(finished, going[0].logprob, num_tokens):
            return dataclasses.replace(self, live=(), parents=(), finished=finished)
        placed = _in_places(going)
        return dataclasses.replace(
            self,
            live=tuple(self._beam(child) for child in placed),
            parents=tuple(child.parent for child in placed),
            finished=finished,
        )

    def _ranked(self, candidates: SequenceOf[Candidates]) -> list[_Child]:
        """What the live beams could become, likeliest first."""
        children = [
            _Child(beam.logprob + logprob, place, token)
            for place, (beam, found) in enumerate(zip(self.live, candidates, strict=True))
            for token, logprob in found[: self.num_candidates]
        ]
        return sorted(children, key=operator.attrgetter("logprob"), reverse=True)

    def _beam(self, child: _Child) -> Beam:
        parent = self.live[child.parent]
        return Beam(parent, child.token, child.logprob, parent.num_tokens + 1)

    def _hypothesis(self, child: _Child, num_tokens: int) -> Hypothesis:
        return Hypothesis(self._beam(child), self._score(child.logprob, num_tokens))

    def _score(self, logprob: float, num_tokens: int) -> float:
        return logprob / num_tokens**self.params.length_penalty

    def _is_settled(self, finished: tuple[Hypothesis, ...], best: float, num_tokens: int) -> bool:
        """Whether no more is to be hoped for; `best` is the likeliest live beam's."""
        params = self.params
        if len(finished) < params.beam_width:
            return False
        if params.early_stopping is True or params.beam_width == 1:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            num_tokens = self.max_tokens
        return self._score(best, num_tokens) <= finished[-1].score


def start_search(
    params: BeamSearchParams,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    eos_token_ids: SequenceOf[int],
) -> BeamSearch:
    """A search that has not begun, for a prompt of that length."""
    max_tokens = max_model_len - num_prompt_tokens
    if params.max_tokens is not None:
        max_tokens = min(max_tokens, params.max_tokens)
    end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return BeamSearch(params=params, end_ids=frozenset(end_ids), max_tokens=max_tokens)


def _in_places(children: list[_Child]) -> list[_Child]:
    """The children, likeliest first, by place: the first of each parent in that parent's."""
    heirs: dict[int, _Child] = {}
    others = []
    for child in children:
        if child.parent in heirs:
            others.append(child)
        else:
            heirs[child.parent] = child
    rest = iter(others)
    return [heirs[place] if place in heirs else next(rest) for place in range(len(children))]
