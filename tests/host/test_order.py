"""Who goes first: priorities, prefixes that are in the cache, and nobody for ever last."""

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks.oracle import WatchedScheduler
from jpaged import admission
from jpaged.config import EngineConfig
from jpaged.plan import StepPlan
from jpaged.prefix_cache import PrefixCache
from jpaged.requests import MAX_OVERTAKEN, Request, Sequence
from jpaged.waiting import NUM_CONSIDERED, WaitingQueue
from tests.host.scripted import assert_undisturbed, make_request, make_scheduler, run_to_end, step

SIZE = 8
OWN_TOKENS = itertools.count(1_000)


def make(**changes: int | bool) -> WatchedScheduler:
    """A scheduler that takes one sequence at a time, unless told otherwise."""
    limits = {"block_size": SIZE, "num_blocks": 40, "max_num_seqs": 1}
    limits |= {"max_num_batched_tokens": 200, "max_model_len": 170}
    return WatchedScheduler(EngineConfig(**limits | changes))  # pyright: ignore[reportArgumentType]


def ask(
    name: str, token_ids: list[int], *, priority: int = 0, n: int = 1, max_tokens: int = 1
) -> Request:
    request = make_request(name, 1, priority=priority, n=n, max_tokens=max_tokens)
    request.prompt_token_ids = token_ids
    for sequence in request.sequences:
        sequence.token_ids = list(token_ids)
        sequence.detokenizer = None
    return request


def blocks(*firsts: int, tail: int = 1) -> list[int]:
    """A block of equal tokens for each of `firsts`, and `tail` tokens that nobody shares."""
    return [first for first in firsts for _ in range(SIZE)] + [next(OWN_TOKENS)] * tail


def planned(scheduler: WatchedScheduler) -> StepPlan:
    """A step, where there is one."""
    plan = step(scheduler)
    assert plan is not None
    return plan


def names_started(plan: StepPlan) -> list[str]:
    return [row.sequence.request.request_id for row in plan.rows if row.is_new]


def order_of_starts(scheduler: WatchedScheduler) -> str:
    names = ""
    while (plan := step(scheduler)) is not None:
        names += "".join(names_started(plan))
    return names


def warm(scheduler: WatchedScheduler, *firsts: int) -> None:
    """Leaves a chain of blocks in the cache."""
    scheduler.add(ask("warm", blocks(*firsts)))
    run_to_end(scheduler)


def test_the_longest_hit_goes_first_and_of_equal_ones_the_earliest():
    scheduler = make()
    warm(scheduler, 1, 2, 3)
    for name, firsts in (
        ("a", (7, 8)),
        ("b", (1,)),
        ("c", (1, 2, 3)),
        ("d", (1, 2)),
        ("e", (1, 2, 3)),
        ("f", (9,)),
    ):
        scheduler.add(ask(name, blocks(*firsts)))
    assert order_of_starts(scheduler) == "cedbaf"


def test_a_better_priority_goes_before_a_longer_hit():
    scheduler = make()
    warm(scheduler, 1, 2, 3)
    scheduler.add(ask("a", blocks(1, 2, 3), priority=2))
    scheduler.add(ask("b", blocks(5), priority=1))
    scheduler.add(ask("c", blocks(1, 2, 3), priority=-4))
    scheduler.add(ask("d", blocks(6), priority=1))
    assert order_of_starts(scheduler) == "cbda"


def test_prompts_that_begin_alike_follow_the_first_of_them_in_the_step_that_computes_it():
    scheduler = make(max_num_seqs=9, max_num_batched_tokens=4 * SIZE)
    for name, first in (("a", 1), ("b", 2), ("c", 1), ("d", 2)):
        scheduler.add(ask(name, blocks(first, first)))
    # Seventeen tokens of "a", one of "c", and what is left of the budget of "b".
    plan = planned(scheduler)
    assert names_started(plan) == ["c", "a", "b"]
    assert [row.num_tokens for row in plan.rows] == [1, 17, 14]


def test_nobody_is_overtaken_more_than_eight_times():
    scheduler = make()
    warm(scheduler, 1)
    for name in "ab":
        scheduler.add(ask(name, blocks(3)))
    for index in range(20):
        scheduler.add(ask("." * (index + 1), blocks(1)))
    started = []
    while (plan := step(scheduler)) is not None:
        started += names_started(plan)
    assert [name[0] for name in started] == ["."] * MAX_OVERTAKEN + ["a", "b"] + ["."] * 12


def test_what_is_not_among_the_first_is_not_looked_at():
    scheduler = make()
    warm(scheduler, 1)
    for index in range(NUM_CONSIDERED + 2):
        scheduler.add(ask(str(index), blocks(1 if index >= NUM_CONSIDERED else 100 + index)))
    assert names_started(planned(scheduler)) == ["0"]
    assert names_started(planned(scheduler)) == [str(NUM_CONSIDERED)]


def test_overtaking_is_bounded_whatever_happens(monkeypatch: pytest.MonkeyPatch):
    overtaken: Counter[Sequence] = Counter()
    start = WaitingQueue.start

    def watch(self: WaitingQueue, sequence: Sequence) -> None:
        if not sequence.num_output_tokens:
            priority = sequence.request.priority
            before = [s for s in self if s.order < sequence.order]
            assert all(s.request.priority == priority for s in before)
            overtaken.update(s for s in before if s.request is not sequence.request)
        start(self, sequence)

    monkeypatch.setattr(WaitingQueue, "start", watch)
    rng = random.Random(3)
    scheduler = make(num_blocks=16, max_num_seqs=4, max_num_batched_tokens=40)
    for index in range(200):
        chain = [rng.randrange(3) for _ in range(rng.randrange(8))]
        priority = rng.choice([0, 0, 0, 1])
        max_tokens = rng.randrange(1, 40)
        n = rng.choice([1, 1, 2])
        request = ask(str(index), blocks(*chain), priority=priority, n=n, max_tokens=max_tokens)
        scheduler.add(request)
        for _ in range(rng.randrange(6)):
            step(scheduler)
    run_to_end(scheduler)
    assert max(overtaken.values()) == MAX_OVERTAKEN
    assert scheduler.counters.preemptions > 10


def test_what_was_preempted_comes_back_before_what_never_ran():
    scheduler = make(num_blocks=9, max_num_seqs=2)
    scheduler.add(ask("a", blocks(1, 2, 3), max_tokens=30))
    scheduler.add(ask("b", blocks(4, 5), max_tokens=9))
    plan = planned(scheduler)
    while not plan.preempted:
        plan = planned(scheduler)
    assert [sequence.request.request_id for sequence in plan.preempted] == ["b"]
    scheduler.add(ask("c", blocks(1, 2, 3), max_tokens=2))  # all in the cache, and little more
    started = order_of_starts(scheduler)
    assert started.index("b") < started.index("c")


def test_forks_begin_in_the_step_that_ends_their_prompt_whoever_waits():
    scheduler = make(max_num_seqs=4, max_num_batched_tokens=20)
    warm(scheduler, 1, 2)
    scheduler.add(ask("a", blocks(5, 5, 5), n=3, max_tokens=4))
    step(scheduler)
    scheduler.add(ask("b", blocks(1, 2)))
    scheduler.add(ask("c", blocks(6), priority=-1))
    plan = planned(scheduler)
    rows = [(row.sequence.request.request_id, row.num_tokens) for row in plan.rows]
    assert rows == [("c", 9), ("a", 5), ("a", 0), ("a", 0)]


def test_a_waiting_prompt_starts_as_soon_as_enough_of_it_is_there():
    scheduler = make(num_blocks=22, max_num_seqs=3, max_num_batched_tokens=3 * SIZE)
    common = blocks(*range(16), tail=0)
    scheduler.add(ask("a", [*common, 99], max_tokens=2))
    step(scheduler)
    scheduler.add(ask("b", [*common, 98, 98], max_tokens=2))  # 17 blocks, 4 are spare
    plan = planned(scheduler)
    while not names_started(plan):
        plan = planned(scheduler)
    assert names_started(plan) == ["b"]
    (last_piece,) = [row for row in plan.rows if not row.is_new]
    assert (last_piece.seq_len, last_piece.samples) == (len(common) + 1, True)


def count_matches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Prompts matched from their beginning, and blocks looked up, since last asked."""
    counts = Counter()
    match, find = PrefixCache.match, admission.find_prefix

    def counted_match(self: PrefixCache, digests: list[bytes]) -> list[int]:
        counts["blocks"] += len(digests)
        return match(self, digests)

    def counted_find(*args: object) -> object:
        counts["prompts"] += 1
        return find(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(PrefixCache, "match", counted_match)
    monkeypatch.setattr(admission, "find_prefix", counted_find)

    def take() -> tuple[int, int]:
        taken = counts["prompts"], counts["blocks"]
        counts.clear()
        return taken

    return take


def test_a_prompt_that_finds_no_room_is_not_matched_again(monkeypatch: pytest.MonkeyPatch):
    take = count_matches(monkeypatch)
    scheduler = make(num_blocks=33, max_num_seqs=3)
    warm(scheduler, *range(16))
    scheduler.add(ask("a", blocks(*range(40, 54)), max_tokens=SIZE * 3 - 1))
    step(scheduler)
    # All but its last block are cached and free: it takes them all, and there is one too few.
    scheduler.add(ask("b", blocks(*range(16)), max_tokens=1))
    scheduler.add(ask("c", blocks(77)))
    take()
    step(scheduler)
    assert take()[0] == 1
    for _ in range(20):
        step(scheduler)
        num_prompts, num_blocks = take()
        assert num_prompts == 0
        assert num_blocks <= 2
    assert scheduler.num_waiting == 2
    run_to_end(scheduler)
    assert scheduler.counters.hit_tokens >= 14 * SIZE  # "a" took the others meanwhile


def test_a_prompt_that_found_no_room_finds_it_when_others_share_what_it_hits():
    scheduler = make(num_blocks=41, max_num_seqs=4, max_num_batched_tokens=400)
    warm(scheduler, *range(16))
    scheduler.add(ask("a", blocks(*range(40, 47)), max_tokens=6))
    scheduler.add(ask("b", blocks(*range(50, 63)), max_tokens=30))
    step(scheduler)
    scheduler.add(ask("c", blocks(*range(16)), max_tokens=2))
    step(scheduler)  # it would take 17 free blocks, and there are 16 to take
    scheduler.add(ask("d", blocks(*range(15)), priority=-1, max_tokens=30))
    assert names_started(planned(scheduler)) == ["d"]
    while "a" in scheduler.requests:
        assert names_started(planned(scheduler)) == []
    assert names_started(planned(scheduler)) == ["c"]  # two are enough now
    assert scheduler.num_running == 3


def test_a_full_pool_asks_the_cache_nothing(monkeypatch: pytest.MonkeyPatch):
    take = count_matches(monkeypatch)
    scheduler = make(num_blocks=15, max_num_seqs=9)
    for name in "ab":
        scheduler.add(ask(name, blocks(*range(5)) + [ord(name)] * SIZE * 3, max_tokens=20))
    for index in range(50):
        scheduler.add(ask(str(index), blocks(0, 1, index)))
    step(scheduler)
    take()
    num_quiet = 0
    while len(scheduler.requests) == 52:
        num_free = scheduler.pool.num_free - scheduler.num_running
        step(scheduler)
        assert num_free > 0 or take() == (0, 0)
        num_quiet += num_free <= 0
    assert num_quiet > 5


def test_without_prefix_caching_nothing_is_considered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(WaitingQueue, "candidates")
    scheduler = make(enable_prefix_caching=False)
    for name in "abc":
        scheduler.add(ask(name, blocks(1, 2)))
    assert order_of_starts(scheduler) == "abc"


def test_a_hit_that_was_evicted_counts_no_more():
    scheduler = make()
    warm(scheduler, 1)
    evicted, there = ask("a", blocks(3, 3, 3)), ask("b", blocks(1, 2))
    evicted.sequences[0].num_hit_blocks = 2  # as it was seen some steps ago
    scheduler.add(evicted)
    scheduler.add(there)
    assert order_of_starts(scheduler) == "ba"
    assert scheduler.counters.hit_tokens == SIZE


# Priorities.


def test_a_better_priority_passes_a_prompt_that_is_half_computed():
    scheduler = make(max_num_seqs=5, max_num_batched_tokens=20)
    scheduler.add(ask("a", blocks(*range(8)), max_tokens=3))
    step(scheduler)
    scheduler.add(ask("b", blocks(*range(20, 26)), priority=-1, max_tokens=3))
    scheduler.add(ask("c", blocks(40), max_tokens=3))
    rows = []
    for _ in range(5):
        plan = planned(scheduler)
        rows.append({row.sequence.request.request_id: row.num_tokens for row in plan.rows})
    # A token for "a" at least; it has the rest when the prompt of "b" ends, then comes "c".
    assert rows[0] == {"b": 19, "a": 1}
    assert rows[1] == {"b": 19, "a": 1}
    assert rows[2] == {"b": 11, "a": 9}
    assert rows[3] == {"b": 1, "a": 19}
    assert rows[4] == {"b": 1, "a": 15, "c": 4}


def test_the_worst_priority_is_preempted_though_it_came_first():
    scheduler = make(num_blocks=9, max_num_seqs=5)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        scheduler.add(ask(name, blocks(ord(name)), priority=priority, max_tokens=25))
    preempted = []
    while (plan := step(scheduler)) is not None:
        preempted += [sequence.request.request_id for sequence in plan.preempted]
    assert preempted[0] == "a"
    assert "b" not in preempted


def test_waiting_never_preempts_what_runs():
    scheduler = make(num_blocks=9, max_num_seqs=5)
    scheduler.add(ask("a", blocks(1, 2, 3, 4), priority=5, max_tokens=20))
    step(scheduler)
    scheduler.add(ask("b", blocks(5, 6, 7), priority=-5))
    assert order_of_starts(scheduler) == "b"
    assert scheduler.counters.preemptions == 0


def test_every_step_gets_the_first_on_and_preempts_only_those_behind():
    rng = random.Random(7)
    num_preempted = 0
    for _ in range(60):
        scheduler = make_scheduler(
            num_blocks=rng.randrange(10, 16),
            max_num_seqs=5,
            max_num_batched_tokens=rng.choice([6, 30]),
        )
        requests = []
        for index in range(rng.randrange(2, 9)):
            requests.append(
                make_request(
                    str(index),
                    rng.randrange(1, 40),
                    seed=index,
                    priority=rng.randrange(-1, 2),
                    max_tokens=rng.randrange(5, 30),
                )
            )
            scheduler.add(requests[-1])
            for _ in range(rng.randrange(4)):
                first = scheduler.running[0] if scheduler.running else None
                num_computed = first.num_computed_tokens if first else 0
                plan = step(scheduler)
                assert plan is not None or not scheduler.has_work
                if first is not None:
                    assert first.finished or first.num_computed_tokens > num_computed
        run_to_end(scheduler, 2_000)
        num_preempted += scheduler.counters.preemptions
        assert scheduler.counters.preemptions < 60
        for request in requests:
            assert_undisturbed(request.sequences[0], 70)
    assert num_preempted > 30


def test_two_that_do_not_fit_together_do_not_take_turns():
    for priorities in ((0, 0), (1, 0), (0, 1)):
        scheduler = make_scheduler(num_blocks=10, max_num_batched_tokens=64)
        for index, priority in enumerate(priorities):
            scheduler.add(
                make_request(str(index), 20, seed=index, priority=priority, max_tokens=50)
            )
        preempted = set()
        while (plan := step(scheduler)) is not None:
            preempted |= {sequence.request.request_id for sequence in plan.preempted}
        assert preempted == {"0" if priorities == (1, 0) else "1"}
        assert scheduler.counters.preemptions < 5
