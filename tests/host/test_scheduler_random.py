"""The scheduler under random use: every rule mixed, exceptions at any point, the same tokens."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jpaged.invariants import check
from jpaged.outputs import Logprob
from jpaged.plan import StepPlan
from jpaged.requests import Request, Sequence
from jpaged.scheduler import Scheduler
from tests.host.scripted import (
    LETTERS,
    MAX_MODEL_LEN,
    InjectedError,
    assert_request_undisturbed,
    assert_undisturbed,
    bare_step,
    commit,
    interrupt,
    make_beams,
    make_request,
    make_scheduler,
    run_to_end,
    scripted_tokens,
    step,
    step_ahead,
)

Step = Callable[[Scheduler], StepPlan | None]
STEPS = st.sampled_from([step, step_ahead])
SALTS = st.sampled_from([None, None, "salt"])


def tails(most: int) -> st.SearchStrategy[list[int]]:
    """What prompts end with that otherwise begin alike: up to `most` times the same token."""
    tokens, counts = st.integers(0, len(LETTERS) - 1), st.integers(0, most)
    return st.builds(lambda token, count: [token] * count, tokens, counts)


class RandomUse(RuleBasedStateMachine):
    """Requests come, go and are cut short; whatever is not aborted ends as if it ran alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.requests: list[Request] = []

    @initialize(
        num_blocks=st.sampled_from([10, 14]),  # of the first, nine: the longest request fits
        max_num_batched_tokens=st.sampled_from([11, 60]),
        num_swap_blocks=st.sampled_from([0, 6, 40]),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        crowd=st.sampled_from([0, 4, 4]),
    )
    def begin(self, crowd: int, **limits: int) -> None:
        """Often with more than the pool holds at once: else few are preempted in so few steps."""
        self.scheduler = make_scheduler(**limits)
        for index in range(crowd):
            self.submit(17, 40, 0, tail=[index] * 9)

    @rule(
        num_prompt=st.integers(1, 40),
        tail=tails(20),
        cache_salt=SALTS,
        n=st.integers(1, 3),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 3),
        stop=st.lists(st.sampled_from(["ab", "c", "eee"]), max_size=2),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def submit(self, num_prompt: int, max_tokens: int, min_tokens: int, **params: Any) -> None:
        request = make_request(
            str(len(self.requests)),
            num_prompt,
            seed=len(self.requests),
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            **params,
        )
        self.scheduler.add(request)
        self.requests.append(request)

    @rule(
        num_prompt=st.integers(1, 9),
        tail=tails(6),
        cache_salt=SALTS,
        beam_width=st.integers(1, 3),
        max_tokens=st.integers(1, 9),
        early_stopping=st.sampled_from([False, True, "never"]),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def submit_beams(self, num_prompt: int, beam_width: int, **params: Any) -> None:
        name = str(len(self.requests))
        request = make_beams(name, num_prompt, beam_width, seed=len(self.requests), **params)
        self.scheduler.add(request)
        self.requests.append(request)

    @rule(num_steps=st.integers(1, 20), step=STEPS)
    def run(self, num_steps: int, step: Step) -> None:
        for _ in range(num_steps):
            step(self.scheduler)

    @precondition(lambda self: self.scheduler.num_running > 1)
    @rule(step=STEPS)
    def run_until_one_is_preempted(self, step: Step) -> None:
        while (plan := step(self.scheduler)) is not None and not plan.preempted:
            pass

    @precondition(lambda self: self.scheduler.has_work)
    @rule(after=st.integers(0, 3_000), num_ahead=st.integers(0, 1))
    def run_with_an_exception_in_the_host(self, after: int, num_ahead: int) -> None:
        with contextlib.suppress(InjectedError), interrupt(after):
            bare_step(self.scheduler, num_ahead=num_ahead)
        self.scheduler.recover()

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def run_with_an_exception_on_the_device(self) -> None:
        plan = self.scheduler.schedule()
        check(self.scheduler, plan)
        self.scheduler.recover()

    @precondition(lambda self: self.scheduler.has_work)
    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice: random.Random) -> None:
        self.scheduler.abort(choice.choice(sorted(self.scheduler.requests)))

    @precondition(lambda self: self.scheduler.has_work)
    @rule(choice=st.randoms(use_true_random=False), after=st.integers(0, 300))
    def abort_with_an_exception(self, choice: random.Random, after: int) -> None:
        name = choice.choice(sorted(self.scheduler.requests))
        try:
            with interrupt(after):
                self.scheduler.abort(name)
        except InjectedError:
            self.scheduler.recover()
        self.scheduler.abort(name)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(choice=st.randoms(use_true_random=False))
    def abort_during_a_step(self, choice: random.Random) -> None:
        plan = self.scheduler.schedule()
        assume(plan is not None)
        assert plan is not None
        self.scheduler.abort(choice.choice(sorted(self.scheduler.requests)))
        check(self.scheduler, plan)
        for plan in self.scheduler.in_flight:
            commit(self.scheduler, plan)

    @rule()
    def reset_prefix_cache(self) -> None:
        done = self.scheduler.reset_prefix_cache()
        assert done == (self.scheduler.num_running == 0)
        assert not done or len(self.scheduler.pool.cache) == 0

    @invariant()
    def promises_hold(self) -> None:
        check(self.scheduler)

    def teardown(self) -> None:
        run_to_end(self.scheduler)
        assert_all_ended_well(self.requests)


TestRandomUse = RandomUse.TestCase
TestRandomUse.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_five_thousand_random_steps_keep_every_promise():
    rng = random.Random(4)
    scheduler = make_scheduler(num_blocks=17, max_num_seqs=9, max_num_batched_tokens=20)
    requests: list[Request] = []
    for _ in range(5_000):
        if len(scheduler.requests) < 12 and rng.random() < 0.3:
            requests.append(random_request(rng, str(len(requests))))
            scheduler.add(requests[-1])
        if scheduler.requests and rng.random() < 0.02:
            scheduler.abort(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.01:
            scheduler.schedule()
            scheduler.recover()
        rng.choice([step, step_ahead])(scheduler)
    run_to_end(scheduler)
    assert_all_ended_well(requests)
    assert scheduler.counters.preemptions > 100
    assert scheduler.counters.recoveries > 30
    assert scheduler.counters.generated_tokens > 10_000


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_an_exception_at_any_bytecode_loses_no_token_and_no_block(num_ahead: int):
    whole = make_small_scene()
    with interrupt(10**9) as count:
        run_small_scene(whole, num_ahead)
    assert whole[0].counters.preemptions > 0
    rng = random.Random(5)
    for after in rng.sample(range(count[0]), 120):
        scheduler, requests = make_small_scene()
        try:
            with interrupt(after):
                run_small_scene((scheduler, requests), num_ahead)
        except InjectedError:
            scheduler.recover()
        check(scheduler)
        for request in requests:
            for sequence in request.sequences:
                assert_logprobs_belong(sequence)
        known = set(scheduler.requests.values())
        run_to_end(scheduler)
        for request in requests:
            if request in known or request.finished:
                assert_all_ended_well([request])
            else:  # cut short in `add`: the request was not taken, and nothing is left of it
                assert not any(s.block_ids or s.num_output_tokens for s in request.sequences)


def test_the_next_call_mends_what_an_exception_left_where_nobody_recovered():
    rng = random.Random(6)
    for _ in range(60):
        scheduler, requests = make_small_scene()
        for request in requests:
            scheduler.add(request)
        for _ in range(3):
            step(scheduler)
        with pytest.raises(InjectedError), interrupt(rng.randrange(60)):
            scheduler.abort("0")
        run_to_end(scheduler)
        assert_all_ended_well(requests)


def test_a_recovery_cut_short_is_begun_again():
    scheduler, requests = make_small_scene()
    for request in requests:
        scheduler.add(request)
    for after in range(0, 2_000, 37):
        step(scheduler)
        try:
            with interrupt(after):
                scheduler.recover()
        except InjectedError:
            pass
        run = scheduler.schedule()
        scheduler.recover()
        assert run is not None or not scheduler.has_work
    run_to_end(scheduler)
    assert_all_ended_well(requests)


def random_request(rng: random.Random, name: str) -> Request:
    if rng.random() < 0.2:
        return make_beams(
            name,
            rng.randrange(1, 14),
            rng.randrange(1, 5),
            seed=int(name),
            max_tokens=rng.randrange(1, 12),
            ignore_eos=rng.random() < 0.7,
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
    return make_request(
        name,
        rng.randrange(1, 50),
        seed=int(name),
        n=rng.choice([1, 1, 1, 2, 4]),
        max_tokens=rng.randrange(1, 60),
        stop=rng.choice([(), ("abc",), ("dd", "fa")]),
        ignore_eos=rng.random() < 0.7,
        priority=rng.choice([0, 0, 0, 1, -1]),
    )


def make_small_scene() -> tuple[Scheduler, list[Request]]:
    """Three requests that chunk, preempt, overtake, stop on text and end by length in few steps."""
    scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=24)
    return scheduler, [
        make_request("0", 14, seed=8, max_tokens=19),
        make_request("1", 15, seed=2, max_tokens=17, stop=["fa", "ab"]),
        make_request("2", 7, seed=3, max_tokens=12, n=2, ignore_eos=False, priority=-1),
    ]


def run_small_scene(scene: tuple[Scheduler, list[Request]], num_ahead: int) -> None:
    scheduler, requests = scene
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        while len(scheduler.in_flight) <= num_ahead and scheduler.schedule() is not None:
            pass
        plan = scheduler.in_flight[0]
        token_ids = scripted_tokens(plan)
        scheduler.commit(plan, token_ids, [{token: Logprob(-float(token))} for token in token_ids])


def assert_all_ended_well(requests: list[Request]) -> None:
    """Whatever was not aborted is as it would be alone."""
    for request in requests:
        assert request.finished
        whole = [sequence for sequence in request.sequences if sequence.finish_reason != "abort"]
        if len(whole) == len(request.sequences):
            assert_request_undisturbed(request)
            continue
        for sequence in whole:  # that ended before its siblings were aborted
            assert_undisturbed(sequence, MAX_MODEL_LEN)


def assert_logprobs_belong(sequence: Sequence) -> None:
    token_ids = sequence.output_token_ids
    assert [list(entry) for entry in sequence.logprobs] == [[token] for token in token_ids]
    assert sequence.cumulative_logprob == -sum(token_ids)
