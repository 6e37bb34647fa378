"""Open loop: requests come when they are due, however slow the steps are."""

import collections
import dataclasses

import pytest

from benchmarks import baseline_model
from benchmarks.arrivals import Arrival
from benchmarks.baseline import Baseline
from benchmarks.open_loop import Progress, replay
from benchmarks.paged_server import PagedServer
from benchmarks.random_checkpoint import TINY, write_checkpoint
from benchmarks.unpaged_server import Refill, UnpagedServer
from jpaged_models import open_named_tensors
from tests.helpers import llm_over, make_prompt, tiny_engine


class HandClock:
    """Moves when a step takes its time, or when it is waited for."""

    def __init__(self) -> None:
        self.time = 100.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds


class ScriptedServer:
    """One request after the other, a token a step; steps take the given seconds in turn."""

    def __init__(self, clock: HandClock, seconds: list[float]) -> None:
        self._clock = clock
        self._seconds = collections.deque(seconds)
        self._queue: collections.deque[tuple[int, int]] = collections.deque()
        self._running: list[int] = []
        self.submitted: list[tuple[int, float]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._queue)

    @property
    def num_held(self) -> int:
        return bool(self._running)

    def submit(self, number: int, arrival: Arrival) -> None:
        self.submitted.append((number, self._clock.now()))
        self._queue.append((number, arrival.max_tokens))

    def step(self) -> Progress:
        self._clock.time += self._seconds.popleft()
        started = []
        if not self._running:
            number, limit = self._queue.popleft()
            self._running, started = [number] * limit, [number]
        return Progress(started, {self._running.pop(): [7]})


def arrivals_at(*seconds: float, max_tokens: int) -> list[Arrival]:
    return [Arrival(seconds=s, prompt=[1, 2, 3], max_tokens=max_tokens) for s in seconds]


def test_a_slow_step_delays_no_arrival():
    clock = HandClock()
    server = ScriptedServer(clock, [0.5, 10, 1, 1, 1, 1])
    run = replay(server, arrivals_at(0, 2, 3, max_tokens=2), clock)
    # The slow step ends at 10.5: both are handed in then, and their clocks have run since 2 and 3.
    assert server.submitted == [(0, 100.0), (1, 110.5), (2, 110.5)]
    assert [one.arrival for one in run.served] == [0, 2, 3]
    assert [one.token_times for one in run.served] == [[0.5, 10.5], [11.5, 12.5], [13.5, 14.5]]
    assert [one.start for one in run.served] == [0, 10.5, 12.5]
    assert run.seconds == 14.5
    assert clock.waits == []


def test_arrivals_never_wait_for_answers_and_an_idle_server_waits_for_them():
    clock = HandClock()
    server = ScriptedServer(clock, [1, 1, 0.25, 0.25])
    run = replay(server, arrivals_at(0, 5, max_tokens=2), clock)
    assert clock.waits == [3.0]  # from the end of the first answer at 2 until 5
    assert run.served[1].token_times == [5.25, 5.5]
    assert run.held == [(1, 1), (1, 1), (0.25, 1), (0.25, 1)]


def test_an_answer_of_another_length_is_noticed():
    clock = HandClock()
    server = ScriptedServer(clock, [1])
    server.submit = lambda number, arrival: ScriptedServer.submit(
        server, number, dataclasses.replace(arrival, max_tokens=1)
    )
    with pytest.raises(AssertionError, match="of 2 tokens ended with 1"):
        replay(server, arrivals_at(9, max_tokens=2), clock)


PROMPT_LENS = (5, 31, 16, 2, 21, 9, 13)
MAX_TOKENS = (11, 1, 6, 9, 1, 2, 14)


def requests() -> list[Arrival]:
    return [
        Arrival(seconds=0.0, prompt=make_prompt(length, seed=length), max_tokens=limit)
        for length, limit in zip(PROMPT_LENS, MAX_TOKENS, strict=True)
    ]


@pytest.mark.parametrize("refill", Refill)
def test_the_unpaged_server_gives_the_tokens_of_the_offline_baseline(refill, tmp_path):
    checkpoint = open_named_tensors(write_checkpoint(tmp_path, TINY, seed=3))
    params = baseline_model.load_params(checkpoint)
    baseline = Baseline(checkpoint.config, params, num_rows=3, reserved=47)
    arrivals = requests()
    expected = baseline.generate([a.prompt for a in arrivals], MAX_TOKENS, ignore_eos=True)
    run = replay(UnpagedServer(baseline, refill), arrivals, HandClock())
    assert [one.token_ids for one in run.served] == expected
    assert max(held for _, held in run.held) == 3


def test_a_static_batch_ends_with_its_last_row_and_a_refilled_one_does_not(tmp_path):
    checkpoint = open_named_tensors(write_checkpoint(tmp_path, TINY, seed=3))
    params = baseline_model.load_params(checkpoint)
    baseline = Baseline(checkpoint.config, params, num_rows=2, reserved=47)
    steps = {}
    for refill in Refill:
        server = UnpagedServer(baseline, refill)
        for number, limit in enumerate((9, 2, 2)):
            server.submit(number, Arrival(seconds=0, prompt=[4, 5], max_tokens=limit))
        started = []
        while server.has_work:
            started.append(server.step().started)
        steps[refill] = started.index([2]), len(started)
    # Before the third: two prompts and eight decode steps, or one, which ends the second.
    assert steps == {Refill.WHEN_ALL_ENDED: (10, 12), Refill.WHEN_ONE_ENDED: (3, 11)}


def test_a_prompt_longer_than_a_row_is_refused_when_it_comes(tmp_path):
    checkpoint = open_named_tensors(write_checkpoint(tmp_path, TINY, seed=3))
    baseline = Baseline(
        checkpoint.config, baseline_model.load_params(checkpoint), num_rows=1, reserved=20
    )
    server = UnpagedServer(baseline, Refill.WHEN_ALL_ENDED)
    with pytest.raises(ValueError, match="holds 1 to 20 tokens, got a prompt of 15"):
        server.submit(0, Arrival(seconds=0, prompt=[1] * 15, max_tokens=6))


def test_the_paged_server_tells_every_token_once_and_when_each_request_starts():
    llm = llm_over(tiny_engine(max_num_seqs=3))
    clock = HandClock()
    arrivals = requests()
    run = replay(PagedServer(llm), arrivals, clock)
    assert [len(one.token_ids) for one in run.served] == list(MAX_TOKENS)
    assert all(one.start is not None for one in run.served)
    assert max(held for _, held in run.held) == 3
    again = replay(PagedServer(llm), arrivals[::-1], clock)
    assert [one.token_ids for one in again.served[::-1]] == [one.token_ids for one in run.served]
