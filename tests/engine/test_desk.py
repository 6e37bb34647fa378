"""What the desk does for its callers costs no more than what they read."""

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
