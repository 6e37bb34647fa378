"""What a caller sent, and the token streams that answer it."""

import dataclasses
from typing import Literal

from jpaged.beams import BeamSearch, Candidates, Hypothesis
from jpaged.detokenize import Detokenizer
from jpaged.outputs import Logprob
from jpaged.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_OVERTAKEN = 8  # times: what a prefix that is in the cache may cost those who have none


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One prompt with its parameters; makes its sequences itself.

    `seed` is the caller's or a drawn one, so that the noise depends on nothing else that runs; it
    and an empty `request_id` are drawn when the request is accepted (`RequestMaker.complete`).
    A lower `priority` runs first. `arrival` is set by `Scheduler.add`, and orders those of one
    priority. `bad_word_ids` are the parameters' `bad_words` as token ids.

    With a `search`, the sequences are its live beams, place by place, and once it is over the best
    that it found. It alone says what was generated; the sequences follow it, and can be made anew.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    search: BeamSearch | None = None
    arrival: int = -1
    sequences: "list[Sequence]" = dataclasses.field(default_factory=list, repr=False)
    num_failures: int = 0
    error: BaseException | None = None

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences = [Sequence(self, index) for index in range(self.params.num_sequences)]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finished for sequence in self.sequences)

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the host must know a step's tokens before it can plan the one after it."""
        if self.search is not None:
            return True
        return bool(self.bad_word_ids) and any(len(ids) > 1 for ids in self.bad_word_ids)

    @property
    def num_together(self) -> int:
        """Sequences that wait for one another, so that all must fit at once."""
        return 1 if self.search is None else len(self.sequences)

    @property
    def returned(self) -> "list[Sequence]":
        """The sequences that the caller gets: with `best_of`, the likeliest ones."""
        if self.search is None:
            if not self.params.ranks:
                return self.sequences
            ranked = sorted(self.sequences, key=lambda s: s.cumulative_logprob, reverse=True)
            return ranked[: self.params.n]
        return self.sequences[: self.search.params.num_returned]


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One token stream of a request.

    `token_ids` is the prompt and then what was generated, and only ever grows, but where a beam
    gives way to another. `row`, `block_ids`, `num_computed_tokens`, `last_token_on_device` and
    `is_forked` say what the device holds of it when it has done all steps that are planned; they
    can all be thrown away and computed again from `token_ids`. `num_in_flight` more tokens are
    sampled by planned steps and not yet known here; they come even to one that has lost its row
    since. With `max_num_tokens` it ends, whatever they are; `Scheduler.add` sets that. While it
    waits, `patience` says how often it may still be overtaken, and `num_hit_blocks` how much of its
    prefix the cache had last. A beam that has `candidates` waits, with all that it holds, for the
    others of its search.
    """

    request: Request = dataclasses.field(repr=False)
    index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = dataclasses.field(default_factory=list)
    row: int | None = None
    last_token_on_device: bool = False
    num_in_flight: int = 0
    max_num_tokens: int = 0
    is_forked: bool = False  # the device does not know yet that the row has another's table
    candidates: Candidates | None = dataclasses.field(default=None, repr=False)
    patience: int = MAX_OVERTAKEN
    num_hit_blocks: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list, repr=False)
    cumulative_logprob: float = 0.0
    hypothesis: Hypothesis | None = dataclasses.field(default=None, repr=False)  # it became one
    detokenizer: Detokenizer | None = dataclasses.field(default=None, repr=False)
    digests: list[bytes] = dataclasses.field(default_factory=list, repr=False)  # of full blocks

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.prompt_token_ids)

    def forget_device(self) -> None:
        """Forgets what the device holds; whoever calls this gives up the row and the blocks."""
        if self.row is not None:
            self.patience = 0  # what was computed once is not to wait for what was never begun
        self.num_computed_tokens = 0
        self.block_ids = []
        self.row = None
        self.last_token_on_device = False
        self.is_forked = False
        self.candidates = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Where the sequence stands among others, running or waiting: the lowest comes first."""
        return self.request.priority, self.request.arrival, self.index

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.token_ids)

    @property
    def num_all_tokens(self) -> int:
        """Tokens known and in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def ends_in_flight(self) -> bool:
        """Whether the sequence ends with the tokens in flight, whatever they are."""
        count = self.num_in_flight
        return count > 0 and len(self.token_ids) + count >= self.max_num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the tokens generated so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text that is settled so far; empty with `detokenize=False`."""
        return "" if self.detokenizer is None else self.detokenizer.text
