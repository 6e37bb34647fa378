"""What sequences share: cached prefixes, forks, copies; and what a broken build would do."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.oracle import Oracle, WatchedScheduler
from jpaged import planner, prefix_cache
from jpaged.blocks import BlockPool
from jpaged.config import EngineConfig
from jpaged.draft import Draft
from jpaged.invariants import check
from jpaged.plan import StepPlan
from jpaged.prefix_cache import PrefixCache, chain_digests, root_digest
from jpaged.requests import Request
from jpaged.scheduler import Scheduler
from jpaged.stats import collect_stats
from jpaged.tables import grow
from tests.host.scripted import make_request, make_scheduler, run_to_end, step


def scheduler_of_ten() -> WatchedScheduler:
    """Ten blocks of sixteen tokens beside the null block, and budget enough for any prompt."""
    return WatchedScheduler(
        EngineConfig(
            block_size=16,
            num_blocks=11,
            max_num_seqs=5,
            max_num_batched_tokens=200,
            max_model_len=176,
        )
    )


def ask(name: str, token_ids: list[int], **params: Any) -> Request:
    request = make_request(name, 1, **params)
    request.prompt_token_ids = token_ids
    for sequence in request.sequences:
        sequence.token_ids = list(token_ids)
        sequence.detokenizer = None
    return request


COMMON = [block for block in range(3) for _ in range(16)]  # three blocks of sixteen


def test_a_second_prompt_shares_whole_blocks_and_frees_leave_them_cached():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", [*COMMON, *[3] * 7]))
    step(scheduler)
    scheduler.add(ask("b", [*COMMON, *[4] * 5]))
    plan = step(scheduler)
    assert plan is not None
    (row,) = [row for row in plan.rows if row.is_new]
    assert (row.start, row.num_tokens) == (48, 5)
    a, b = (scheduler.requests[name].sequences[0] for name in "ab")
    assert a.block_ids[:3] == b.block_ids[:3]
    assert [scheduler.pool.ref_counts[block] for block in a.block_ids] == [2, 2, 2, 1]
    shared, tails = a.block_ids[:3], (a.block_ids[3], b.block_ids[3])
    scheduler.abort("a")
    assert [scheduler.pool.ref_counts[block] for block in shared] == [1, 1, 1]
    scheduler.abort("b")
    check(scheduler)
    # Blank blocks first, then what is cached, a tail before its head.
    assert scheduler.pool.free_ids[-3:] == tuple(reversed(shared))
    assert set(tails) <= set(scheduler.pool.free_ids[:7])
    assert scheduler.pool.num_cached == 3


def test_a_miss_that_takes_everything_evicts_the_oldest_and_a_tail_before_its_head():
    scheduler = scheduler_of_ten()
    for name, first in (("a", 0), ("b", 50)):
        scheduler.add(ask(name, [first + token for token in COMMON], max_tokens=1))
        run_to_end(scheduler)
    expected = scheduler.pool.free_ids
    assert scheduler.pool.num_cached == 6
    taken = scheduler.pool.allocate(10)
    assert taken == list(expected)
    assert len(scheduler.pool.cache) == 0
    scheduler.pool.free(taken)
    scheduler.add(ask("c", list(range(100, 250)), max_tokens=10))
    run_to_end(scheduler)
    assert scheduler.counters.hit_tokens == 0


def test_a_hit_on_a_free_cached_block_uses_it_up():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", [*COMMON, 9], max_tokens=1))
    run_to_end(scheduler)
    assert (scheduler.pool.num_free, scheduler.pool.num_cached) == (10, 3)
    scheduler.add(ask("b", [*COMMON, 8], max_tokens=2))
    step(scheduler)
    assert (scheduler.pool.num_free, scheduler.pool.num_cached) == (6, 0)
    assert scheduler.counters.hit_tokens == 48


def test_without_enough_blocks_a_waiting_sequence_takes_no_reference():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", [*COMMON, *range(20, 80)], max_tokens=20))
    step(scheduler)
    scheduler.add(ask("b", [*COMMON, *range(90, 170)], max_tokens=5))
    before = list(scheduler.pool.ref_counts)
    step(scheduler)
    assert scheduler.num_waiting == 1
    assert scheduler.pool.ref_counts == before
    run_to_end(scheduler)


def test_a_preempted_sequence_resumes_with_what_is_still_cached():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", list(range(60)), max_tokens=50))
    scheduler.add(ask("b", list(range(100, 175)), max_tokens=60))
    resumed = []
    while (plan := step(scheduler)) is not None:
        resumed += [
            row.start
            for row in plan.rows
            if row.is_new and row.sequence.num_output_tokens and row.forked is None
        ]
    assert scheduler.counters.preemptions > 0
    assert any(resumed)


def test_a_prompt_of_whole_blocks_shares_all_but_the_last_and_copies_that():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", COMMON, max_tokens=1))
    run_to_end(scheduler)
    scheduler.add(ask("b", COMMON, max_tokens=1))
    plan = step(scheduler)
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(47, 1)]
    ((source, destination),) = plan.copies
    assert source != destination
    assert scheduler.counters.hit_tokens == 47


@pytest.mark.parametrize(("num_common", "expected"), [(8, 16), (9, 25), (15, 31)])
def test_a_block_of_which_more_than_half_begins_alike_is_copied(num_common: int, expected: int):
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", list(range(40)), max_tokens=1))
    run_to_end(scheduler)
    scheduler.add(ask("b", [*range(16 + num_common), *[99] * 20], max_tokens=1))
    plan = step(scheduler)
    assert plan is not None
    assert plan.rows[0].start == expected
    assert len(plan.copies) == (expected > 16)


def test_a_copy_that_would_not_fit_beside_its_source_is_done_without():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", list(range(150)), max_tokens=1))
    run_to_end(scheduler)
    # Of nine cached blocks eight are shared, the ninth begins alike; all ten are wanted.
    scheduler.add(ask("b", [*range(138), *[999] * 20], max_tokens=2))
    plan = step(scheduler)
    assert plan is not None
    assert (plan.rows[0].start, plan.copies) == (128, ())


def test_prompts_of_one_step_share_what_it_writes_whole_and_nothing_that_it_completes():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=24)
    scheduler.add(make_request("a", 28))  # of which 24 in the first step, three whole blocks
    step(scheduler)
    scheduler.add(make_request("b", 30))
    plan = step(scheduler)  # "a" writes the first half of its fourth block
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(24, 4), (24, 6)]
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 28))
    scheduler.add(make_request("b", 28))
    plan = step(scheduler)
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(0, 28), (24, 4)]
    run_to_end(scheduler)


def test_a_block_that_this_step_completes_is_not_hit_in_it():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 23))  # 20, then 3: the third block is written in two steps
    step(scheduler)
    a = scheduler.requests["a"].sequences[0]
    a.token_ids.append(2)  # as if the answer had begun: the block becomes whole in this step
    a.request.prompt_token_ids = list(a.token_ids)
    scheduler.add(ask("b", [*a.token_ids, 3, 4]))
    plan = step(scheduler)
    assert plan is not None
    assert [row.start for row in plan.rows] == [20, 16]


def test_salts_keep_prefixes_apart_and_caching_can_be_off():
    scheduler = scheduler_of_ten()
    starts = []
    for name, salt in (("a", None), ("b", "x"), ("c", "x"), ("d", None)):
        scheduler.add(ask(name, [*COMMON, 7], max_tokens=1, cache_salt=salt))
        plan = step(scheduler)
        assert plan is not None
        starts.append(plan.rows[0].start)
    assert starts == [0, 0, 48, 48]
    off = make_scheduler(enable_prefix_caching=False, max_num_batched_tokens=64)
    for name in "ab":
        off.add(make_request(name, 20, max_tokens=1))
        run_to_end(off)
    assert (off.counters.hit_tokens, off.pool.num_cached) == (0, 0)


def test_the_cache_is_reset_only_when_no_block_is_in_use():
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", [*COMMON, 7], max_tokens=4))
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    run_to_end(scheduler)
    assert scheduler.pool.num_cached == 3
    assert scheduler.reset_prefix_cache()
    check(scheduler)
    assert (scheduler.pool.num_cached, scheduler.pool.num_free) == (0, 10)


def test_forks_share_the_prompt_and_the_first_to_write_copies_its_tail():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=64)
    request = make_request("a", 21, n=3, max_tokens=12)
    scheduler.add(request)
    plan = step(scheduler)
    assert plan is not None
    assert plan.num_tokens == 21  # the prompt is computed once
    assert [row.forked for row in plan.rows] == [None, plan.rows[0].row, plan.rows[0].row]
    assert len({tuple(s.block_ids) for s in request.sequences}) == 1
    assert scheduler.pool.num_used == 3
    stats = collect_stats(scheduler)
    assert (stats.tokens_held, stats.saving) == (21, 1 - 3 / 9)
    assert stats.mean_saving == stats.saving
    plan = step(scheduler)
    assert plan is not None
    assert len(plan.copies) == 2  # the last holder of the tail writes in place
    assert len({source for source, _ in plan.copies}) == 1
    assert scheduler.pool.num_used == 5
    assert collect_stats(scheduler).mean_saving == 1 - (3 + 5) / (9 + 9)
    plan = step(scheduler)
    assert plan is not None
    assert plan.copies == ()
    run_to_end(scheduler)


def test_forks_of_a_prompt_of_whole_blocks_copy_nothing():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 16, n=4))
    run_to_end(scheduler)
    assert scheduler.counters.copied_blocks == 0


def test_a_sibling_that_found_no_row_starts_later_from_the_cache():
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=2, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 21, n=3, max_tokens=5))
    starts = []
    while (plan := step(scheduler)) is not None:
        starts += [(row.start, row.forked is None) for row in plan.rows if row.is_new]
    assert starts == [(0, True), (21, False), (16, True)]


def test_a_failed_step_withdraws_what_it_would_have_written():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 20))
    scheduler.schedule()
    scheduler.recover()
    plan = step(scheduler)
    assert plan is not None
    assert plan.rows[0].start == 0
    run_to_end(scheduler)


def test_equal_prefixes_have_equal_digests_and_nothing_else_has():
    root = root_digest(None)
    chain = chain_digests(root, list(range(40)), 8)
    assert len(chain) == 5
    assert chain_digests(chain[1], list(range(16, 40)), 8) == chain[2:]
    assert len({root_digest(salt) for salt in (None, "", "salt", "salt:")}) == 4
    assert chain_digests(root, [1, *range(1, 8)], 8)[0] != chain[0]


# Broken builds: each must be caught by the oracle or by check(), else neither proves anything.


def busy_run(scheduler: WatchedScheduler) -> None:
    """Sharing, forks, copies, preemption, eviction and a failed step, in one short life."""
    for index in range(8):
        num_prompt = 16 if index < 2 else 13 + 3 * index % 23
        request = make_request(
            str(index), num_prompt, seed=index, n=1 + (index + 1) // 2 % 3, max_tokens=14
        )
        scheduler.add(request)
    for _ in range(3):
        scheduler.schedule()
        scheduler.recover()
        for _ in range(3):
            step(scheduler)
    run_to_end(scheduler)


def drop_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Draft.plan

    def without_copies(self: Any) -> StepPlan:
        self.copies.clear()
        return plan(self)

    monkeypatch.setattr(Draft, "plan", without_copies)


def free_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free = BlockPool.free

    def twice(self: BlockPool, block_ids: list[int]) -> None:
        free(self, block_ids)
        free(self, block_ids[-1:])

    monkeypatch.setattr(BlockPool, "free", twice)


def keep_stale_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: PrefixCache, block_id: int) -> None:
        self._entries.pop(block_id)

    monkeypatch.setattr(PrefixCache, "forget", forget)


def shift_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*args: Any) -> list[tuple[int, int]]:
        return [(column + 1, block) for column, block in grow(*args)]

    monkeypatch.setattr(planner, "grow", shifted)


def copy_after_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, move = Oracle.run, Oracle.move

    def late(self: Oracle, plan: StepPlan) -> None:
        monkeypatch.setattr(Oracle, "move", lambda *_: None)
        try:
            run(self, plan)
        finally:
            monkeypatch.setattr(Oracle, "move", move)
        self.move(plan)

    monkeypatch.setattr(Oracle, "run", late)


def trust_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    start_over = Scheduler._start_over

    def remember(self: Any) -> None:
        old = self.pool if hasattr(self, "_planner") else None
        start_over(self)
        if old is not None:
            old.cache.settle()
            old.ref_counts = [0] * old.num_blocks
            old._blank_ids = [b for b in range(1, old.num_blocks) if b not in old.cache]
            old._cached_ids.update(dict.fromkeys(b for b in range(1, 99) if b in old.cache))
            self._planner.pool = self._planner._admission.pool = old

    monkeypatch.setattr(Scheduler, "_start_over", remember)


def hit_what_a_step_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    def closest_child(self: PrefixCache, *args: Any) -> tuple[int, int]:
        held, self._provisional = self._provisional, {}
        try:
            return original(self, *args)
        finally:
            self._provisional = held

    original = prefix_cache.PrefixCache.closest_child
    monkeypatch.setattr(PrefixCache, "closest_child", closest_child)


def test_the_busy_run_itself_is_sound():
    scheduler = make_scheduler(num_blocks=11, max_num_batched_tokens=40)
    busy_run(scheduler)
    counters = scheduler.counters
    assert min(counters.copied_blocks, counters.hit_tokens, counters.preemptions) > 0


@pytest.mark.parametrize(
    "break_it",
    [
        drop_copies,
        free_twice,
        keep_stale_hashes,
        shift_tables,
        copy_after_writing,
        trust_a_failed_step,
        hit_what_a_step_completes,
    ],
)
def test_a_broken_build_is_caught(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        busy_run(make_scheduler(num_blocks=11, max_num_batched_tokens=40))
