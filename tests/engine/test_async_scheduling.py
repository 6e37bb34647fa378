"""A step is planned and sent while the one before it runs; nobody can tell from the answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine as engine_module
from jpaged.beams import BeamSearchParams
from jpaged.engine import Engine
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.step import StepOutput
from tests.helpers import llm_over, make_prompt, tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [make_prompt(length, seed=length) for length in (11, 3, 26, 17)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=4, n=2, max_tokens=25, logprobs=2),
    SamplingParams(temperature=0.7, seed=5, top_p=0.9, max_tokens=9, frequency_penalty=1.5),
    SamplingParams(temperature=1.2, seed=6, max_tokens=20, stop_token_ids=[0, 9, 18, 27, 36, 45]),
]


def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the engine's two dealings with the device came when, from here on."""
    events: list[str] = []
    run, fetch = llm.engine.runner.run, engine_module.fetch

    def watched_run(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        events.append("send")
        return run(plan, outputs)

    def watched_fetch(*args: Any) -> Any:
        events.append("fetch")
        return fetch(*args)

    llm.engine.runner.run = watched_run
    monkeypatch.setattr(engine_module, "fetch", watched_fetch)
    return events


@pytest.mark.parametrize("num_blocks", [60, 7])  # room for all; preemption
def test_answers_are_the_same_with_and_without(num_blocks: int):
    answers = []
    for async_scheduling in (True, False):
        limits = {"num_blocks": num_blocks, "async_scheduling": async_scheduling}
        llm = llm_over(tiny_engine(**limits))
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        answers.append([output.outputs for output in outputs])
        assert (llm.stats().preemptions > 0) == (num_blocks == 7)
    assert {s.finish_reason for outputs in answers[0] for s in outputs} == {"stop", "length"}
    assert answers[0] == answers[1]


def test_the_next_step_is_sent_before_tokens_are_waited_for(monkeypatch: pytest.MonkeyPatch):
    llm = llm_over(tiny_engine())
    events = watched(llm, monkeypatch)
    llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    # And none is sent of which it is known that nobody needs it.
    assert events == ["send", *["send", "fetch"] * 5, "fetch"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.beam_search(PROMPTS[1], BeamSearchParams(beam_width=2, max_tokens=6)),
        lambda llm: llm.generate(
            PROMPTS[1], SamplingParams(max_tokens=6, bad_words=[[5, 6]]), use_tqdm=False
        ),
    ],
    ids=["beams", "bad words"],
)
def test_what_depends_on_the_tokens_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[LLM], object]
):
    llm = llm_over(tiny_engine())
    events = watched(llm, monkeypatch)
    ask(llm)
    assert events == ["send", "fetch"] * (len(events) // 2)


def test_a_stop_nobody_foresaw_costs_one_token_and_nothing_else():
    computed = []
    for async_scheduling in (False, True):
        llm = llm_over(tiny_engine(async_scheduling=async_scheduling))
        drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
        (output,) = llm.generate(PROMPTS[1], drawn, use_tqdm=False)
        tokens = output.outputs[0].token_ids
        last = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
        before = llm.stats()
        params = dataclasses.replace(drawn, stop_token_ids=[tokens[last]])
        other = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        (short, _) = llm.generate([PROMPTS[1], PROMPTS[0]], [params, other], use_tqdm=False)
        assert short.outputs[0].token_ids == tokens[: last + 1]
        after = llm.stats()
        assert after.blocks_used == 0
        assert after.generated_tokens - before.generated_tokens == last + 1 + 12
        computed.append(after.computed_tokens - before.computed_tokens)
    assert computed[1] == computed[0] + 1


def test_an_abort_between_two_steps_in_flight_leaves_the_others_alone():
    llm = llm_over(tiny_engine(num_blocks=12))
    whole = llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)[1].outputs[0].token_ids
    ids = [llm.submit(prompt, GREEDY) for prompt in PROMPTS[:2]]
    llm.step()
    llm.abort(ids[0])
    answers = {}
    while llm.has_unfinished_requests:
        answers |= {output.request_id: output for output in llm.step()}
    assert answers[ids[1]].outputs[0].token_ids == whole
    assert llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == whole


def test_a_step_that_fails_on_the_device_later_is_made_good():
    """Its arrays look like any others until somebody waits for them."""
    engine = tiny_engine()
    llm = llm_over(engine)
    expected = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    break_pool_later(engine, number=3)
    output = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == expected
    assert llm.stats().recoveries == 1


def break_pool_later(engine: Engine, *, number: int) -> None:
    """Lets the device fail in the run of that number, after the call has returned."""
    runner, count = engine.runner, 0
    run = runner.run

    def fail(_: np.ndarray) -> np.ndarray:
        raise OSError("the device is gone")

    @jax.jit
    def broken(pool: Any) -> Any:
        zero = jax.pure_callback(fail, jax.ShapeDtypeStruct((), np.float32), jnp.float32(0))
        return jax.tree.map(lambda leaf: leaf + zero, pool)

    def run_and_break(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        nonlocal count
        count += 1
        if count == number:
            runner.pool = broken(runner.pool)
        return run(plan, outputs)

    runner.run = run_and_break
