"""Failures anywhere leave every block free, the engine usable and later answers right."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from jpaged import engine as engine_module
from jpaged.errors import EngineFailedError
from jpaged.invariants import check
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.step import StepOutput
from tests.helpers import llm_over, make_prompt, tiny_engine
from tests.host.scripted import InjectedError, interrupt

# Few blocks, so that sequences wait and are preempted while things go wrong.
LIMITS = {"num_blocks": 7, "max_num_seqs": 3, "max_num_batched_tokens": 13}
PROMPTS = [make_prompt(length, seed=length) for length in (11, 3, 26)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=4, n=2, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=5, top_p=0.9, max_tokens=5, ignore_eos=True),
]
NUM_POINTS = 120  # seeded points of each kind

Tokens = list[list[list[int]]]  # of each request, of each of its sequences


class DeviceError(Exception):
    """What a broken device might raise."""


@pytest.fixture
def llm() -> LLM:
    return llm_over(tiny_engine(**LIMITS))


@pytest.fixture(scope="module")
def answers() -> Tokens:
    """What the requests get when nothing goes wrong."""
    llm = llm_over(tiny_engine(**LIMITS))
    found = tokens_of(generate(llm))
    assert llm.stats().preemptions > 0
    return found


def generate(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> Tokens:
    return [[sequence.token_ids for sequence in output.outputs] for output in outputs]


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.scheduler.requests
    assert not llm.has_unfinished_requests
    assert not llm._desk._requests
    stats = llm.stats()
    assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    check(llm.engine.scheduler)


def assert_usable(llm: LLM, answers: Tokens) -> None:
    """Nothing is held, and the requests get their answers."""
    assert_idle(llm)
    assert tokens_of(generate(llm)) == answers
    assert_idle(llm)


def fail_at(target: Any, name: str, numbers: set[int], error: BaseException, *, when: str) -> None:
    """Calls of those numbers raise, "before" or "after" they have done their work."""
    original, count = getattr(target, name), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count in numbers and when == "before":
            raise error
        result = original(*args, **options)
        if count in numbers:
            raise error
        return result

    setattr(target, name, failing)


@pytest.fixture
def restored_fetch() -> Iterator[None]:
    original = engine_module.fetch
    yield
    engine_module.fetch = original


TARGETS: dict[str, Callable[[LLM], Any]] = {
    "run": lambda llm: llm.engine.runner,
    "fetch": lambda _: engine_module,
    "commit": lambda llm: llm.engine.scheduler,
}


@pytest.mark.usefixtures("restored_fetch")
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 9, 17])
def test_one_failure_of_a_step_is_made_good(
    llm: LLM, answers: Tokens, name: str, when: str, number: int
):
    fail_at(TARGETS[name](llm), name, {number}, DeviceError("once"), when=when)
    assert tokens_of(generate(llm)) == answers
    assert llm.stats().recoveries == 1
    assert_usable(llm, answers)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_scheduler_is_reported_and_usable_again(llm: LLM, answers: Tokens, when: str):
    fail_at(llm.engine.scheduler, "schedule", {6}, DeviceError("once"), when=when)
    with pytest.raises(DeviceError):
        generate(llm)
    assert_usable(llm, answers)


@pytest.mark.parametrize("number", [1, 5, 20])
@pytest.mark.parametrize("lost", ["pool", "state", "both"])
def test_a_lost_pool_is_made_anew(llm: LLM, answers: Tokens, number: int, lost: str):
    runner, run, count = llm.engine.runner, llm.engine.runner.run, 0

    def run_and_lose(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        nonlocal count
        count += 1
        out = run(plan, outputs)
        if count != number:
            return out
        arrays = {"pool": runner.pool, "state": runner.state, "both": (runner.pool, runner.state)}
        for leaf in jax.tree.leaves(arrays[lost]):
            leaf.delete()
        raise DeviceError("after the donation")

    runner.run = run_and_lose
    assert tokens_of(generate(llm)) == answers
    assert not runner.is_lost
    assert_usable(llm, answers)


def test_a_second_failure_ends_the_requests_that_failed_and_keeps_their_text(
    llm: LLM, answers: Tokens
):
    fail_at(llm.engine.runner, "run", {22, 25}, DeviceError("again and again"), when="after")
    with pytest.raises(EngineFailedError, match="again and again") as caught:
        generate(llm)
    outputs = caught.value.outputs
    assert len(outputs) == len(PROMPTS)
    assert all(output.finished for output in outputs)
    reasons = [sequence.finish_reason for output in outputs for sequence in output.outputs]
    assert set(reasons) == {"error", "length"}
    for found, expected in zip(tokens_of(outputs), answers, strict=True):
        for tokens, whole in zip(found, expected, strict=True):
            assert tokens == whole[: len(tokens)]
    assert any(tokens for found in tokens_of(outputs) for tokens in found)
    assert_usable(llm, answers)


def test_a_stream_whose_steps_fail_twice_raises_after_what_it_gave(llm: LLM, answers: Tokens):
    fail_at(llm.engine.runner, "run", {4, 6}, DeviceError("again"), when="before")
    tokens: list[int] = []

    def read() -> None:
        for delta in llm.stream(PROMPTS[0], PARAMS[0]):
            tokens.extend(delta.outputs[0].token_ids)

    with pytest.raises(EngineFailedError) as caught:
        read()
    assert tokens == answers[0][0][: len(tokens)]
    assert len(tokens) > 0
    (output,) = caught.value.outputs
    assert output.outputs[0].finish_reason == "error"
    assert_usable(llm, answers)


def count_points(run: Callable[[LLM], object]) -> int:
    """Bytecodes of the engine's host code in one undisturbed run."""
    llm = llm_over(tiny_engine(**LIMITS))
    run(llm)  # so that nothing is done for the first time below
    with interrupt(10**9) as count:
        run(llm)
    return count[0]


def test_an_interrupt_at_any_bytecode_of_generate_leaves_the_engine_usable(
    llm: LLM, answers: Tokens
):
    num_points = count_points(generate)
    rng, interrupted = random.Random(0), 0
    for _ in range(NUM_POINTS):
        try:
            with interrupt(rng.randrange(num_points)):
                generate(llm)
        except InjectedError:
            interrupted += 1
        assert_idle(llm)
        if rng.random() < 0.2:
            assert_usable(llm, answers)
    assert interrupted == NUM_POINTS
    assert_usable(llm, answers)


def test_an_exception_at_any_bytecode_of_generate_is_made_good_or_raised(llm: LLM, answers: Tokens):
    num_points, rng = count_points(generate), random.Random(5)
    num_made_good = num_raised = 0
    for _ in range(NUM_POINTS):
        try:
            with interrupt(rng.randrange(num_points), DeviceError):
                found = tokens_of(generate(llm))
        except DeviceError:  # outside the step, or while it was being planned
            num_raised += 1
        else:
            num_made_good += 1
            assert found == answers
        assert_idle(llm)
    assert min(num_made_good, num_raised) > NUM_POINTS // 10
    assert_usable(llm, answers)


def test_an_exception_at_any_bytecode_of_a_last_commit_loses_no_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    scheduler = llm.engine.scheduler
    commit, point, came_to_its_end = scheduler.commit, 0, False

    def failing(*args: Any) -> Any:
        nonlocal came_to_its_end
        monkeypatch.undo()
        with interrupt(point, DeviceError):
            changed = commit(*args)
        came_to_its_end = True
        return changed

    while not came_to_its_end:
        monkeypatch.setattr(scheduler, "commit", failing)
        ids = [llm.submit(make_prompt(length), params) for length in (5, 3)]
        finished: dict[str, RequestOutput] = {}
        drive(llm, finished)
        assert sorted(finished) == sorted(ids), f"an end was lost at bytecode {point}"
        assert all(len(output.outputs[0].token_ids) == 1 for output in finished.values())
        assert_idle(llm)
        point += 1
    assert point > 200


def submit_all(llm: LLM) -> list[str]:
    return [llm.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def drive(llm: LLM, finished: dict[str, RequestOutput]) -> None:
    """Steps until nothing is left to say."""
    while llm.has_unfinished_requests:
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = output


def test_whoever_catches_an_interrupt_and_steps_on_loses_nothing(llm: LLM, answers: Tokens):
    def run(llm: LLM) -> None:
        submit_all(llm)
        drive(llm, {})

    num_points, rng = count_points(run), random.Random(1)
    for _ in range(NUM_POINTS):
        ids = submit_all(llm)
        finished: dict[str, RequestOutput] = {}
        try:
            # One step is where the interrupt falls, and what it returned may be lost with it.
            with interrupt(rng.randrange(num_points)):
                drive(llm, finished)
        except InjectedError:
            drive(llm, finished)
        found = tokens_of([finished[request_id] for request_id in ids])
        assert found == answers
        assert_idle(llm)


def test_an_interrupt_of_the_recovery_itself_leaves_the_engine_usable(llm: LLM, answers: Tokens):
    rng, runner, run = random.Random(2), llm.engine.runner, llm.engine.runner.run
    for _ in range(NUM_POINTS // 5):
        calls_left, point = rng.randrange(20), rng.randrange(900)

        def run_and_lose(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
            nonlocal calls_left
            calls_left -= 1
            out = run(plan, outputs)
            if calls_left == 0:
                jax.tree.leaves(runner.pool)[0].delete()
                armed.enter_context(interrupt(point))  # noqa: B023
                raise DeviceError("and then an interrupt")
            return out

        runner.run = run_and_lose
        with contextlib.ExitStack() as armed, contextlib.suppress(InjectedError):
            generate(llm)
        runner.run = run
        assert_usable(llm, answers)


def test_a_real_keyboard_interrupt_in_a_step_ends_the_call_and_frees_its_blocks(
    llm: LLM, answers: Tokens
):
    for when in ("before", "after"):
        run = llm.engine.runner.run
        fail_at(llm.engine.runner, "run", {7}, KeyboardInterrupt(), when=when)
        with pytest.raises(KeyboardInterrupt):
            generate(llm)
        llm.engine.runner.run = run
        assert_usable(llm, answers)


def test_aborts_at_seeded_points_free_their_blocks_and_leave_the_others_alone(
    llm: LLM, answers: Tokens
):
    rng = random.Random(3)
    for _ in range(NUM_POINTS):
        ids = submit_all(llm)
        victim, moment = rng.randrange(3), rng.randrange(30)
        finished: dict[str, RequestOutput] = {}
        for _ in range(moment):
            for output in llm.step() if llm.has_unfinished_requests else []:
                if output.finished:
                    finished[output.request_id] = output
        llm.abort(ids[victim])
        check(llm.engine.scheduler)
        drive(llm, finished)
        for index, request_id in enumerate(ids):
            tokens = tokens_of([finished[request_id]])[0]
            if index != victim:
                assert tokens == answers[index]
            for part, whole in zip(tokens, answers[index], strict=True):
                assert part == whole[: len(part)]
        assert_idle(llm)


def test_streams_closed_at_seeded_points_free_their_blocks(llm: LLM, answers: Tokens):
    rng = random.Random(4)
    for _ in range(NUM_POINTS):
        which = rng.randrange(3)
        stream = llm.stream(PROMPTS[which], PARAMS[which])
        for _ in range(rng.randrange(12)):
            next(stream, None)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert_idle(llm)
    assert_usable(llm, answers)
