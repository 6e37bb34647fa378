"""Every request has an id of its own, and nobody ends another's request."""

import dataclasses
from typing import Any

import pytest

from jpaged.errors import QueueFullError
from jpaged.invariants import check
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.requests import Request
from tests.helpers import llm_over, make_prompt, tiny_engine

PROMPT, OTHER = make_prompt(9), make_prompt(12, seed=1)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(n=2, max_tokens=6, ignore_eos=True)  # with seeds that are drawn


@pytest.fixture
def llm() -> LLM:
    return llm_over(tiny_engine())


@pytest.fixture(scope="module")
def answer() -> list[int]:
    """What OTHER gets from an engine that is its own."""
    (output,) = llm_over(tiny_engine()).generate(OTHER, GREEDY, use_tqdm=False)
    return output.outputs[0].token_ids


def drain(llm: LLM) -> dict[str, RequestOutput]:
    """Steps until nothing is left; what each request ended with."""
    finished: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests:
        finished |= {output.request_id: output for output in llm.step() if output.finished}
    check(llm.engine.scheduler)
    assert not llm._desk._requests
    assert not llm._desk._news
    return finished


def held(llm: LLM) -> Any:
    return dict(llm._desk._requests), dict(llm.engine.scheduler.requests), dict(llm._desk._news)


def test_drawn_ids_pass_over_those_that_callers_gave(llm: LLM, answer: list[int]):
    given = ["0", "1", "3"]
    for request_id in given:
        assert llm.submit(OTHER, GREEDY, request_id=request_id) == request_id
    outputs = llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False)
    assert not {output.request_id for output in outputs} & set(given)
    drawn = llm.submit(OTHER, GREEDY)
    finished = drain(llm)
    assert set(finished) == {*given, drawn}
    assert all(output.outputs[0].token_ids == answer for output in finished.values())


def test_a_stream_that_has_not_begun_holds_no_id(llm: LLM, answer: list[int]):
    streams = [llm.stream(PROMPT, GREEDY) for _ in range(2)]
    for request_id in ("0", "1"):
        llm.submit(OTHER, GREEDY, request_id=request_id)
    lengths = [sum(len(d.outputs[0].token_ids) for d in stream) for stream in streams]
    assert lengths == [6, 6]
    finished = drain(llm)
    assert [finished[i].outputs[0].token_ids for i in ("0", "1")] == [answer] * 2


@pytest.mark.parametrize(
    ("request_id", "error", "message"),
    [
        (3, TypeError, "request_id must be a string, got 3"),
        (b"a", TypeError, "request_id must be a string"),
        (["a"], TypeError, "request_id must be a string"),
        ("", ValueError, "request_id is empty"),
        ("\udcff", ValueError, "request_id must be text"),
        ("running", ValueError, "request_id 'running' is in use"),
        ("waiting", ValueError, "request_id 'waiting' is in use"),
        ("aborted", ValueError, "request_id 'aborted' is in use"),
        ("untold", ValueError, "request_id 'untold' is in use"),
    ],
    ids=ascii,
)
def test_an_id_that_cannot_be_is_refused_and_nothing_changes(
    llm: LLM, request_id: Any, error: type[Exception], message: str, answer: list[int]
):
    llm.submit(OTHER, dataclasses.replace(GREEDY, max_tokens=1), request_id="untold")
    llm.submit(OTHER, GREEDY, request_id="running")
    llm.submit(OTHER, GREEDY, request_id="aborted")
    for _ in range(3):
        llm._desk._advance()  # as `generate` or a stream of somebody else would
    llm.submit(OTHER, GREEDY, request_id="waiting")
    llm.abort("aborted")
    before = held(llm)
    with pytest.raises(error, match=message):
        llm.submit(PROMPT, GREEDY, request_id=request_id)
    assert held(llm) == before
    finished = drain(llm)
    assert finished["untold"].outputs[0].token_ids == answer[:1]
    assert finished["aborted"].outputs[0].finish_reason == "abort"
    assert [finished[i].outputs[0].token_ids for i in ("running", "waiting")] == [answer] * 2


def test_an_id_is_free_again_when_its_end_was_told(llm: LLM, answer: list[int]):
    for _ in range(2):
        llm.submit(OTHER, GREEDY, request_id="again")
        assert drain(llm)["again"].outputs[0].token_ids == answer


@pytest.mark.parametrize("request_id", [3, None, ["a"], b"a"], ids=str)
def test_abort_takes_a_string(llm: LLM, request_id: Any):
    llm.submit(OTHER, GREEDY, request_id="a")
    with pytest.raises(TypeError, match="request_id must be a string"):
        llm.abort(request_id)
    llm.abort("never heard of")
    assert drain(llm)["a"].outputs[0].finish_reason == "length"


def test_what_a_full_queue_refuses_is_forgotten_and_no_more(llm: LLM, answer: list[int]):
    scheduler = llm.engine.scheduler
    scheduler.config = dataclasses.replace(scheduler.config, max_waiting=2)
    llm.submit(OTHER, GREEDY, request_id="first")
    before = held(llm)
    with pytest.raises(QueueFullError):
        llm.submit(PROMPT, SEEDED, request_id="second")
    with pytest.raises(QueueFullError):
        llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False)
    with pytest.raises(QueueFullError):
        next(llm.stream(PROMPT, SEEDED))
    assert held(llm) == before
    assert drain(llm)["first"].outputs[0].token_ids == answer


def test_refused_prompts_do_not_change_the_seeds_of_those_that_come_after():
    answers = []
    for num_refused in (0, 3):
        llm = llm_over(tiny_engine())
        scheduler = llm.engine.scheduler
        scheduler.config = dataclasses.replace(scheduler.config, max_waiting=2)
        for _ in range(num_refused):
            with pytest.raises(QueueFullError):
                llm.generate([PROMPT] * 3, SEEDED, use_tqdm=False)
            for bad in ([PROMPT, [99]], [PROMPT, make_prompt(96)]):
                with pytest.raises(ValueError, match=r"outside|max_model_len"):
                    llm.generate(bad, SEEDED, use_tqdm=False)
        (output,) = llm.generate(PROMPT, SEEDED, use_tqdm=False)
        answers.append(output.outputs)
        assert output.request_id == "0"
        assert llm.stats().prompt_tokens == len(PROMPT)
    assert answers[0] == answers[1]
    assert answers[0][0].token_ids != answers[0][1].token_ids


def test_an_interrupted_submit_leaves_no_request_that_nobody_knows(llm: LLM, answer: list[int]):
    llm.submit(OTHER, GREEDY, request_id="known")
    before, add = held(llm), llm.engine.scheduler.add

    def interrupted(request: Request) -> None:
        add(request)
        raise KeyboardInterrupt

    llm.engine.scheduler.add = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.submit(PROMPT, GREEDY)
    llm.engine.scheduler.add = add
    assert held(llm) == before
    assert drain(llm)["known"].outputs[0].token_ids == answer
