"""Which requests are answered first, by every door of `LLM`."""

import pytest

from jpaged.llm import LLM
from jpaged.requests import Sequence
from tests.helpers import GREEDY, llm_over, make_prompt, tiny_engine


@pytest.fixture
def llm() -> LLM:
    """It runs one sequence at a time."""
    return llm_over(tiny_engine(max_num_seqs=1))


def watch_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of prompts, in the order in which their answers end."""
    ended, run = [], llm.engine.step

    def step() -> list[Sequence]:
        changed = run()
        ended.extend(s.num_prompt_tokens for s in changed if s.finished)
        return changed

    monkeypatch.setattr(llm.engine, "step", step)
    return ended


@pytest.mark.parametrize(
    ("priority", "expected"),
    [(None, [3, 5, 7, 9]), (4, [3, 5, 7, 9]), ([1, 0, 1, -2], [9, 5, 3, 7])],
)
def test_prompts_of_a_lower_priority_are_answered_first(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, priority: list[int] | None, expected: list[int]
):
    ended = watch_ends(llm, monkeypatch)
    prompts = [make_prompt(count) for count in (3, 5, 7, 9)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, priority=priority)
    assert ended == expected
    assert [len(output.prompt_token_ids) for output in outputs] == [3, 5, 7, 9]


def test_submitted_prompts_and_streams_have_a_priority_too(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    ended = watch_ends(llm, monkeypatch)
    llm.submit(make_prompt(3), GREEDY, priority=2)
    llm.submit(make_prompt(5), GREEDY, priority=1)
    for _ in llm.stream(make_prompt(7), GREEDY, priority=-1):
        pass
    while llm.has_unfinished_requests:
        llm.step()
    assert ended == [7, 5, 3]


def test_a_prompt_that_others_pass_is_answered_as_if_it_ran_alone():
    prompts = [make_prompt(count, seed=count) for count in (55, 41, 30)]
    alone = [
        llm_over(tiny_engine()).generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        for prompt in prompts
    ]
    llm = llm_over(tiny_engine(async_scheduling=False))
    answers = {}
    names = []
    for priority, prompt in zip((2, 1, 0), prompts, strict=True):
        names.append(llm.submit(prompt, GREEDY, priority=priority))
        llm.step()  # 16 tokens of the newest but one for each that it passed
    assert [s.num_computed_tokens for s in llm.engine.scheduler.running] == [14, 16, 18]
    while llm.has_unfinished_requests:
        answers |= {output.request_id: output for output in llm.step()}
    assert [answers[name].outputs[0].token_ids for name in names] == alone
