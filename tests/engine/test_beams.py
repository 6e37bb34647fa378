"""Beams on the device: what a plain search over the model finds, whatever happens meanwhile."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine as engine_module
from jpaged.beams import BeamSearchParams
from jpaged.engine import Engine
from jpaged.errors import EngineFailedError
from jpaged.invariants import check
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.step import StepOutput
from jpaged_models import Decoder
from pallas_kernels import default_backend
from tests.engine.test_recovery import (
    DeviceError,
    assert_idle,
    fail_at,
    restored_fetch,
)
from tests.helpers import (
    llm_over,
    make_engine,
    make_prompt,
    make_request,
    record_logits,
    run_to_end,
    start_without_reserve,
    tiny_engine,
)
from tests.host.beam_tables import Scored, assert_same, plain_search, scored
from tests.host.scripted import InjectedError, interrupt

SCORE = 1e-4  # the tiny model's
GOLDEN_SCORE = 1e-3
GOLDEN = pathlib.Path(__file__).parent / "goldens" / "beams.json"
EOS = 2
TIGHT = {"num_blocks": 13, "max_num_seqs": 4, "max_num_batched_tokens": 13}
PROMPTS = [make_prompt(length, seed=length) for length in (11, 3, 18)]
PARAMS = [
    BeamSearchParams(beam_width=3, max_tokens=14),
    BeamSearchParams(beam_width=4, max_tokens=9, length_penalty=0.0, early_stopping="never"),
    BeamSearchParams(beam_width=2, max_tokens=12, early_stopping=True, stop_token_ids=[7, 9, 30]),
]

__all__ = ["restored_fetch"]  # a fixture


class Unpaged:
    """The tiny model's log-probabilities, a whole prompt at a time and nothing kept."""

    def __init__(self) -> None:
        self.engine = tiny_engine(enable_prefix_caching=False)
        self.newest = np.zeros(0)
        record_logits(self.engine, lambda _, __, logits: setattr(self, "newest", logits[-1]))

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        run_to_end(self.engine, [make_request(token_ids, max_tokens=1)])
        logits = self.newest.astype(np.float64) - self.newest.max()
        return logits - np.log(np.exp(logits).sum())


@functools.cache
def expected(index: int) -> Scored:
    """What a plain search finds for one of PROMPTS."""
    params = PARAMS[index]
    end_ids = {EOS, *params.stop_token_ids}
    return plain_search(Unpaged(), params, sorted(end_ids), prompt=PROMPTS[index])


def assert_expected(outputs: Sequence[RequestOutput]) -> None:
    for index, output in enumerate(outputs):
        assert_same(scored(output), expected(index), index, SCORE)


def search(llm: LLM) -> list[RequestOutput]:
    return llm.beam_search(PROMPTS, PARAMS, use_tqdm=False)


@pytest.fixture
def llm() -> LLM:
    return llm_over(tiny_engine(**TIGHT))


def watch(engine: Engine) -> None:
    """Checks every invariant after every step, in a pool that is poisoned where nobody wrote."""
    step = engine.step

    def checked_step() -> Any:
        ended = step()
        check(engine.scheduler)
        return ended

    engine.step = checked_step
    engine.runner.pool = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), engine.runner.pool)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        TIGHT,
        TIGHT | {"enable_prefix_caching": False},
        {"num_blocks": 17, "max_num_batched_tokens": 5},
    ],
    ids=str,
)
def test_beams_are_those_of_a_plain_search_over_the_unpaged_model(limits: dict[str, Any]):
    engine = tiny_engine(**limits)
    watch(engine)
    llm = llm_over(engine)
    assert_expected(search(llm))
    assert llm.stats().copied_blocks > 0
    assert_expected(search(llm))  # warm
    assert_idle(llm)


def test_beams_do_not_mind_company_and_company_does_not_mind_beams():
    """Others have penalties, log-probabilities and forks; all are preempted now and then."""
    company = [
        (make_prompt(9, seed=1), SamplingParams(temperature=0.8, n=2, seed=3, max_tokens=30)),
        (make_prompt(14, seed=2), SamplingParams(temperature=0, logprobs=5, max_tokens=20)),
        (
            make_prompt(5, seed=3),
            SamplingParams(temperature=0, frequency_penalty=1.0, max_tokens=20),
        ),
    ]
    alone = llm_over(tiny_engine())
    answers = [alone.generate(*one, use_tqdm=False)[0] for one in company]
    engine = tiny_engine(**TIGHT)
    watch(engine)
    llm = llm_over(engine)
    finished: dict[str, RequestOutput] = {}
    ids = [llm.submit(*one) for one in company]
    requests = [
        llm._maker.make_beams(prompt, params, max_model_len=96)
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    for request in requests:
        llm._desk.submit(request)
    while llm.has_unfinished_requests:
        finished |= {output.request_id: output for output in llm.step() if output.finished}
    assert llm.stats().preemptions > 0
    assert_expected([finished[request.request_id] for request in requests])
    for name, answer in zip(ids, answers, strict=True):
        for found, wanted in zip(finished[name].outputs, answer.outputs, strict=True):
            assert found.token_ids == wanted.token_ids
            assert found.logprobs is None or wanted.logprobs is not None
            for ours, theirs in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
                assert list(ours) == list(theirs)


# The second is the smallest pool that takes the longest search: beams are preempted, and wait.
@pytest.mark.parametrize("num_blocks", [300, 81])
def test_beams_of_the_default_model_are_those_of_transformers(
    smollm2_decoder: Decoder, num_blocks: int, monkeypatch: pytest.MonkeyPatch
):
    """`make_beam_goldens.py` wrote them; `tests/parity` has more prompts."""
    start_without_reserve(monkeypatch)
    engine = make_engine(
        smollm2_decoder,
        backend=default_backend(),
        block_size=8,
        num_blocks=num_blocks,
        max_num_seqs=40,
        max_num_batched_tokens=64,
        max_model_len=300,
    )
    searches = json.loads(GOLDEN.read_text())["searches"]
    llm = llm_over(engine)
    outputs = llm.beam_search(
        [one["prompt"] for one in searches],
        [BeamSearchParams(**one["params"]) for one in searches],
        use_tqdm=False,
    )
    assert (llm.stats().preemptions > 0) == (num_blocks == 81)
    for output, one in zip(outputs, searches, strict=True):
        wanted = list(zip(one["tokens"], one["scores"], strict=True))
        assert_same(scored(output), wanted, one["params"], GOLDEN_SCORE)


def test_one_beam_is_greedy_search():
    llm = llm_over(tiny_engine())
    (beam,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=1, max_tokens=20))
    (greedy,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=20, logprobs=1))
    (found,), (wanted,) = beam.outputs, greedy.outputs
    assert found.token_ids == wanted.token_ids
    assert found.finish_reason == wanted.finish_reason
    assert found.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=SCORE)


def test_an_output_has_its_score_and_ends_as_others_do():
    llm = llm_over(tiny_engine())
    params = dataclasses.replace(PARAMS[2], n=1, length_penalty=0.5)
    (output,) = llm.beam_search([PROMPTS[2]], params, use_tqdm=False)
    assert output.finished
    (best,) = output.outputs
    assert best.cumulative_logprob is not None
    assert best.score == pytest.approx(best.cumulative_logprob / len(best.token_ids) ** 0.5)
    assert best.logprobs is None
    assert (best.index, best.text) == (0, "")
    (whole,) = llm.beam_search([PROMPTS[2]], dataclasses.replace(params, n=None), use_tqdm=False)
    assert len(whole.outputs) == 2
    assert whole.outputs[0] == best
    for found in whole.outputs:
        last = found.token_ids[-1]
        stopped = last in params.stop_token_ids
        assert found.stop_reason == (last if stopped else None)
        assert found.finish_reason == ("stop" if stopped or last == EOS else "length")
    (sampled,) = llm.generate([PROMPTS[2]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert sampled.outputs[0].score is None


def test_a_search_that_reaches_the_models_length_ends_there():
    llm = llm_over(tiny_engine())
    prompt = make_prompt(90, seed=4)
    params = BeamSearchParams(beam_width=2, max_tokens=None, ignore_eos=True)
    (output,) = llm.beam_search(prompt, params, use_tqdm=False)
    assert [len(o.token_ids) for o in output.outputs] == [6, 6]
    assert {o.finish_reason for o in output.outputs} == {"length"}


def test_programs_for_beams_are_compiled_when_asked_for_and_once():
    llm = llm_over(tiny_engine())
    llm.engine.runner.programs = dict(llm.engine.runner.programs)
    before = llm.stats()
    search(llm)
    first = llm.stats()
    search(llm)
    assert llm.stats().lazy_compiles == first.lazy_compiles
    assert first.lazy_compiles - before.lazy_compiles == first.compiles - before.compiles
    llm.generate(PROMPTS, SamplingParams(max_tokens=3), use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([1, 2], {"beam_width": 5}, "beam_width=5 needs .* allow 4"),
        ([1, 2], {"beam_width": 4, "max_tokens": 40}, "4 beams may need 24 blocks of 8 tokens"),
        ([1, 53], {}, "token id 53 is outside the vocabulary of 53"),
        ([1, 2], {"stop_token_ids": [53]}, "stop token id 53"),
        ([1, 2], {"stop_token_ids": list(range(51))}, "beam_width=3 and 51 token ids .* be 53"),
        ([], {}, "empty"),
        ([3] * 96, {}, "max_model_len is 96"),
        ("text", {}, "no tokenizer"),
    ],
)
def test_what_cannot_run_refuses_the_whole_call(
    llm: LLM, prompt: Any, changes: dict[str, Any], message: str
):
    params = [PARAMS[0], dataclasses.replace(PARAMS[0], **changes)]
    with pytest.raises(ValueError, match=message):
        llm.beam_search([PROMPTS[0], prompt], params, use_tqdm=False)
    assert_idle(llm)
    assert llm.stats().steps == 0


def test_wrong_types_are_refused_by_name(llm: LLM):
    wrong: Any
    for wrong in (None, SamplingParams(), [PARAMS[0], SamplingParams(), None], 3, "a"):
        with pytest.raises(TypeError, match="expected BeamSearchParams"):
            llm.beam_search(PROMPTS, wrong)
    with pytest.raises(ValueError, match="got 3 prompts and 2 BeamSearchParams"):
        llm.beam_search(PROMPTS, PARAMS[:2])
    wrong = 1
    with pytest.raises(TypeError, match="use_tqdm"):
        llm.beam_search(PROMPTS, PARAMS, use_tqdm=wrong)
    wrong = PARAMS[0]
    with pytest.raises(TypeError, match="expected SamplingParams"):
        llm.generate(PROMPTS, wrong)


@pytest.mark.usefixtures("restored_fetch")
@pytest.mark.parametrize("name", ["run", "fetch", "commit", "advance"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 4, 13])
def test_one_failure_of_a_step_is_made_good(llm: LLM, name: str, when: str, number: int):
    owners = {"run": llm.engine.runner, "fetch": engine_module}
    target = owners.get(name, llm.engine.scheduler)
    fail_at(target, name, {number}, DeviceError("once"), when=when)
    assert_expected(search(llm))
    assert llm.stats().recoveries == 1
    assert_idle(llm)


def test_a_lost_pool_is_made_anew_and_the_beams_go_on(llm: LLM):
    runner, run, count = llm.engine.runner, llm.engine.runner.run, 0

    def run_and_lose(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        nonlocal count
        count += 1
        out = run(plan, outputs)
        if count == 9:
            for leaf in jax.tree.leaves((runner.pool, runner.state)):
                leaf.delete()
            raise DeviceError("after the donation")
        return out

    runner.run = run_and_lose
    assert_expected(search(llm))
    assert_idle(llm)


def test_a_second_failure_raises_with_the_beams_as_they_were(llm: LLM):
    fail_at(llm.engine.runner, "run", {6, 8}, DeviceError("again and again"), when="after")
    with pytest.raises(EngineFailedError, match="again and again") as caught:
        search(llm)
    outputs = caught.value.outputs
    assert [len(output.outputs) for output in outputs] == [3, 4, 2]
    failed = [output for output in outputs if output.outputs[0].finish_reason == "error"]
    assert failed
    for output in failed:
        assert all(found.score is None for found in output.outputs)
    assert_idle(llm)
    assert_expected(search(llm))


def test_an_interrupt_at_any_bytecode_leaves_the_engine_usable(llm: LLM):
    search(llm)  # so that nothing is done for the first time below
    with interrupt(10**9) as count:
        search(llm)
    rng, interrupted = random.Random(0), 0
    for _ in range(60):
        try:
            with interrupt(rng.randrange(count[0])):
                search(llm)
        except InjectedError:
            interrupted += 1
        assert_idle(llm)
        if rng.random() < 0.2:
            assert_expected(search(llm))
    assert interrupted == 60
    assert_expected(search(llm))


def test_whoever_catches_an_interrupt_and_steps_on_loses_no_beam(llm: LLM):
    def start() -> list[Any]:
        requests = [
            llm._maker.make_beams(prompt, params, max_model_len=96)
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
        for request in requests:
            llm._desk.submit(request)
        return requests

    def drive(finished: dict[str, RequestOutput]) -> None:
        while llm.has_unfinished_requests:
            finished |= {output.request_id: output for output in llm.step() if output.finished}

    start()
    with interrupt(10**9) as count:
        drive({})
    rng = random.Random(1)
    for _ in range(60):
        requests = start()
        finished: dict[str, RequestOutput] = {}
        with contextlib.suppress(InjectedError), interrupt(rng.randrange(count[0])):
            drive(finished)
        drive(finished)
        assert_expected([finished[request.request_id] for request in requests])
        assert_idle(llm)
