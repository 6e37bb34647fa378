"""What the desk does for its callers costs no more than what they read."""

import threading

import pytest

from jpaged import desk
from jpaged.params import SamplingParams
from tests.helpers import llm_over, make_prompt, tiny_engine


def test_generate_makes_one_output_a_request_however_many_sequences_it_has(
    monkeypatch: pytest.MonkeyPatch,
):
    made: list[str] = []
    make = desk.request_output

    def counting(request):
        made.append(request.request_id)
        return make(request)

    monkeypatch.setattr(desk, "request_output", counting)
    params = SamplingParams(n=9, seed=1, max_tokens=6, ignore_eos=True)
    outputs = llm_over(tiny_engine()).generate([make_prompt(5), make_prompt(3)], params)
    assert [len(output.outputs) for output in outputs] == [9, 9]
    assert sorted(made) == sorted(output.request_id for output in outputs)


def test_a_step_makes_one_output_for_each_request_that_changed(monkeypatch: pytest.MonkeyPatch):
    llm, made, make = llm_over(tiny_engine()), [], desk.request_output
    monkeypatch.setattr(desk, "request_output", lambda request: made.append(1) or make(request))
    llm.submit(make_prompt(5), SamplingParams(n=4, seed=1, max_tokens=6, ignore_eos=True))
    while llm.has_unfinished_requests:
        made.clear()
        assert len(llm.step()) == len(made) <= 1


def test_another_thread_is_sent_away_while_a_step_runs(monkeypatch: pytest.MonkeyPatch):
    llm, refusals = llm_over(tiny_engine()), []
    step = llm.engine.step

    def intrude() -> None:
        with pytest.raises(RuntimeError, match="one thread at a time; use AsyncLLM") as refusal:
            llm.generate([make_prompt(4)])
        refusals.append(refusal)

    def step_with_a_visitor():
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return step()

    monkeypatch.setattr(llm.engine, "step", step_with_a_visitor)
    (output,) = llm.generate([make_prompt(5)], SamplingParams(temperature=0, max_tokens=3))
    assert len(output.outputs[0].token_ids) == 3
    assert len(refusals) == 3
    assert llm.stats().blocks_used == 0
