"""Requests whose tokens are known beforehand, and exceptions at chosen points of host code."""

import contextlib
import inspect
import random
import sys
import types
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.oracle import WatchedScheduler
from benchmarks.scripted_beams import advance_beams, make_beam_request, scripted_search
from jpaged.beams import BeamSearchParams
from jpaged.config import EngineConfig
from jpaged.detokenize import Detokenizer
from jpaged.invariants import check
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.requests import Request, Sequence
from jpaged.scheduler import Scheduler

LETTERS = "abcdefg"  # token i is the i-th letter
EOS = 6
MAX_MODEL_LEN = 70  # of make_scheduler
HOST_CODE = str(Path(sys.modules[Scheduler.__module__].__file__ or "").parent)


class LetterTokenizer:
    """One letter a token, so that a test can read the text off the token ids."""

    def __init__(self) -> None:
        vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
        model = tokenizers.models.WordLevel(vocabulary, unk_token="a")
        self.backend = tokenizers.Tokenizer(model)
        self.backend.decoder = tokenizers.decoders.Fuse()


TOKENIZER = LetterTokenizer()


class InjectedError(BaseException):
    """Raised by `interrupt`; like KeyboardInterrupt it is no `Exception`."""


def make_scheduler(**changes: Any) -> WatchedScheduler:
    limits: dict[str, Any] = {
        "block_size": 8,
        "num_blocks": 14,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 11,
        "max_model_len": MAX_MODEL_LEN,
    }
    return WatchedScheduler(EngineConfig(**limits | changes), eos_token_ids=[EOS])


def make_request(
    name: str,
    num_prompt: int,
    *,
    tail: SequenceOf[int] = (),
    seed: int = 1,
    priority: int = 0,
    **params: object,
) -> Request:
    """A request that asks for 6 tokens and ignores the end of sequence, unless told otherwise.

    Its prompt is `num_prompt` tokens that all prompts begin with, and then `tail`.
    """
    given = {"max_tokens": 6, "ignore_eos": True} | params
    request = Request(
        request_id=name,
        prompt=None,
        prompt_token_ids=[*(index % len(LETTERS) for index in range(num_prompt)), *tail],
        params=SamplingParams(**given),  # pyright: ignore[reportArgumentType]
        seed=seed,
        priority=priority,
    )
    attach_detokenizers(request)
    return request


def make_beams(
    name: str,
    num_prompt: int,
    beam_width: int,
    *,
    tail: SequenceOf[int] = (),
    seed: int = 1,
    priority: int = 0,
    **params: object,
) -> Request:
    """A request for beams: 6 tokens, an end of sequence ends them, unless told otherwise."""
    given = {"beam_width": beam_width, "max_tokens": 6} | params
    request = make_beam_request(
        name,
        [*(index % len(LETTERS) for index in range(num_prompt)), *tail],
        BeamSearchParams(**given),  # pyright: ignore[reportArgumentType]
        seed=seed,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        priority=priority,
    )
    attach_detokenizers(request)
    return request


def attach_detokenizers(request: Request) -> None:
    for sequence in request.sequences:
        sequence.detokenizer = Detokenizer(
            TOKENIZER,
            prompt_token_ids=request.prompt_token_ids,
            skip_special_tokens=True,
            stop=request.params.stop,
            include_stop_str_in_output=request.params.include_stop_str_in_output,
            min_tokens=request.params.min_tokens,
        )


def scripted_token(sequence: Sequence, position: int) -> int:
    """The token at `position`, like a model's: it depends on nothing else that runs."""
    return random.Random(f"{sequence.request.seed} {sequence.index} {position}").randrange(7)


def scripted_tokens(plan: StepPlan) -> list[int]:
    """What the device would send back; rubbish where a row does not sample."""
    return [scripted_token(row.sequence, row.seq_len) if row.samples else -1 for row in plan.rows]


def step(scheduler: Scheduler) -> StepPlan | None:
    """One step with its checks, alone."""
    for plan in scheduler.in_flight:
        commit(scheduler, plan)
    plan = scheduler.schedule()
    if plan is not None:
        check(scheduler, plan)
        commit(scheduler, plan)
    check(scheduler)
    return plan


def step_ahead(scheduler: Scheduler) -> StepPlan | None:
    """As the engine does: the oldest step is taken in when another one is planned; with checks."""
    while len(scheduler.in_flight) < 2 and (plan := scheduler.schedule()) is not None:
        check(scheduler, plan)
    plan = _take_in_oldest(scheduler)
    check(scheduler)
    return plan


def bare_step(scheduler: Scheduler, *, num_ahead: int) -> StepPlan | None:
    """The same without the checks, or with `num_ahead=0` each step alone."""
    while len(scheduler.in_flight) <= num_ahead and scheduler.schedule() is not None:
        pass
    return _take_in_oldest(scheduler)


def _take_in_oldest(scheduler: Scheduler) -> StepPlan | None:
    if not scheduler.in_flight:
        return None
    plan = scheduler.in_flight[0]
    commit(scheduler, plan)
    return plan


def commit(scheduler: Scheduler, plan: StepPlan) -> list[Sequence]:
    """Takes in the scripted tokens and candidates; the sequences that got a token or ended."""
    changed = scheduler.commit(plan, scripted_tokens(plan))
    return changed + advance_beams(scheduler, plan, num_tokens=len(LETTERS))


def run_to_end(scheduler: Scheduler, most: int = 2_000) -> int:
    """Steps until nothing is left; the number of steps."""
    for num_steps in range(most):
        if step(scheduler) is None:
            return num_steps
    raise AssertionError(f"still {len(scheduler.requests)} requests after {most} steps")


def expected_ending(sequence: Sequence, max_model_len: int) -> tuple[list[int], str, str]:
    """The tokens, text and finish reason of a sequence that nobody disturbs."""
    params, token_ids, text = sequence.request.params, [], ""
    num_prompt = sequence.num_prompt_tokens
    while True:
        token = scripted_token(sequence, num_prompt + len(token_ids))
        token_ids.append(token)
        counts = len(token_ids) > params.min_tokens
        if counts and (token in params.stop_token_ids or (token == EOS and not params.ignore_eos)):
            return token_ids, text, "stop"
        text += LETTERS[token]
        for stop in params.stop:
            if counts and text.endswith(stop):
                return token_ids, text.removesuffix(stop), "stop"
        if len(token_ids) == params.max_tokens or num_prompt + len(token_ids) == max_model_len:
            return token_ids, text, "length"


def assert_beams_undisturbed(request: Request) -> None:
    """Fails unless the request's hypotheses are those of its search alone."""
    expected = scripted_search(request, num_tokens=len(LETTERS)).finished
    num_prompt = len(request.prompt_token_ids)
    for sequence, found in zip(request.sequences, expected, strict=True):
        token_ids, hypothesis = found.beam.token_ids, sequence.hypothesis
        assert sequence.output_token_ids == token_ids
        assert hypothesis is not None
        assert (hypothesis.score, hypothesis.beam.logprob) == (found.score, found.beam.logprob)
        ended = token_ids[-1] in request.params.stop_token_ids or (
            token_ids[-1] == EOS and not request.params.ignore_eos
        )
        assert (
            ended
            or num_prompt + len(token_ids) == MAX_MODEL_LEN
            or (request.params.max_tokens == len(token_ids))
        )
        assert sequence.finish_reason == ("stop" if ended else "length")
        text = token_ids[:-1] if ended else token_ids
        assert sequence.text == "".join(LETTERS[token] for token in text)


def assert_undisturbed(sequence: Sequence, max_model_len: int) -> None:
    token_ids, text, reason = expected_ending(sequence, max_model_len)
    assert sequence.output_token_ids == token_ids
    assert (sequence.text, sequence.finish_reason) == (text, reason)


def assert_request_undisturbed(request: Request) -> None:
    """Fails unless everything that answers the request is what it would be alone."""
    if request.search is not None:
        assert_beams_undisturbed(request)
        return
    for sequence in request.sequences:
        assert_undisturbed(sequence, MAX_MODEL_LEN)


@contextlib.contextmanager
def interrupt(after: int, error: type[BaseException] = InjectedError) -> Iterator[list[int]]:
    """Raises `error` at one bytecode of jpaged's code; yields the count of those run."""
    before, count = sys.gettrace(), [0]

    def trace(frame: types.FrameType, event: str, _: object) -> object:
        code = frame.f_code
        # In a generator that is being thrown away an exception goes nowhere, so none is raised in
        # one; what surrounds it and what it calls is interrupted all the same.
        if not code.co_filename.startswith(HOST_CODE) or code.co_flags & inspect.CO_GENERATOR:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count[0] += 1
            if count[0] > after:
                raise error(f"at bytecode {after}")
        return trace

    # Python 3.12 turns these events on in settrace, and only where a frame has asked before.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)  # pyright: ignore[reportArgumentType]
    try:
        yield count
    finally:
        sys.settrace(before)
