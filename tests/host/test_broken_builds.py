"""What a broken build would do, and that somebody notices: else no check proves anything."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.oracle import Oracle, WatchedScheduler
from jpaged import invariants, planner, prefix_cache, sharing
from jpaged.blocks import BlockPool
from jpaged.draft import Draft
from jpaged.plan import StepPlan
from jpaged.prefix_cache import PrefixCache, root_digest
from jpaged.requests import Sequence
from jpaged.scheduler import Scheduler
from jpaged.tables import grow
from tests.host import test_sharing
from tests.host.scripted import make_beams, make_request, make_scheduler, run_to_end, step


def busy_run(scheduler: WatchedScheduler) -> None:
    """Sharing, salts, forks, copies, preemption, swaps, eviction and failed steps: a short life."""
    for index in range(8):
        num_prompt = 16 if index < 2 else 13 + 3 * index % 23
        request = make_request(
            str(index),
            num_prompt,
            seed=index,
            n=1 + (index + 1) // 2 % 3,
            max_tokens=14,
            cache_salt="salt" if index % 3 == 2 else None,
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

    def without_copies(self: Any, *args: Any) -> StepPlan:
        self.copies.clear()
        return plan(self, *args)

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

    def late(self: Oracle, plan: StepPlan, running: list[Sequence]) -> None:
        monkeypatch.setattr(Oracle, "move", lambda *_: None)
        try:
            run(self, plan, running)
        finally:
            monkeypatch.setattr(Oracle, "move", move)
        self.move(plan)

    monkeypatch.setattr(Oracle, "run", late)


def trust_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    start_over = Scheduler._free_all

    def remember(self: Any) -> None:
        old = self.pool if hasattr(self, "_planner") else None
        start_over(self)
        if old is not None:
            old.cache.settle()
            old.ref_counts = [0] * old.num_blocks
            old._blank_ids = [b for b in range(1, old.num_blocks) if b not in old.cache]
            old._cached_ids.update(dict.fromkeys(b for b in range(1, 99) if b in old.cache))
            self._planner.pool = self._planner._admission.pool = old

    monkeypatch.setattr(Scheduler, "_free_all", remember)


def hit_what_a_step_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    def closest_child(self: PrefixCache, *args: Any) -> tuple[int, int]:
        held, self._provisional = self._provisional, {}
        try:
            return original(self, *args)
        finally:
            self._provisional = held

    original = prefix_cache.PrefixCache.closest_child
    monkeypatch.setattr(PrefixCache, "closest_child", closest_child)


def drop_swap_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Draft.plan

    def without_swap_ins(self: Any, *args: Any) -> StepPlan:
        self.swap_ins.clear()
        return plan(self, *args)

    monkeypatch.setattr(Draft, "plan", without_swap_ins)


def drop_swap_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Draft.plan

    def without_swap_outs(self: Any, *args: Any) -> StepPlan:
        self.swap_outs.clear()
        return plan(self, *args)

    monkeypatch.setattr(Draft, "plan", without_swap_outs)


def ignore_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sharing, invariants):  # lest they disagree about what a digest stands for
        monkeypatch.setattr(module, "root_digest", lambda _: root_digest(None))


def make_busy_scheduler() -> WatchedScheduler:
    return make_scheduler(num_blocks=11, max_num_batched_tokens=40, num_swap_blocks=12)


def test_the_busy_run_itself_is_sound():
    scheduler = make_busy_scheduler()
    busy_run(scheduler)
    counters = scheduler.counters
    assert min(counters.copied_blocks, counters.hit_tokens, counters.preemptions) > 0
    assert min(counters.swapped_out_blocks, counters.swapped_in_blocks) > 0


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
        drop_swap_ins,
        drop_swap_outs,
        ignore_salts,
    ],
)
def test_a_broken_build_is_caught(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        busy_run(make_busy_scheduler())


@pytest.mark.parametrize("when", ["before", "move", "write"])
def test_what_a_beam_that_waits_holds_is_watched_too(when: str):
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=25)
    scheduler.add(make_request("first", 20, max_tokens=40))
    scheduler.add(make_beams("beams", 9, 3, max_tokens=15, ignore_eos=True))
    while not (found := blocks_of_waiting_beams(scheduler)):
        step(scheduler)
    oracle: Any = scheduler.oracle

    def spoil() -> None:
        oracle.pool[found] += 1

    if when == "before":
        spoil()
    else:
        original = getattr(oracle, when)
        setattr(oracle, when, lambda argument: (original(argument), spoil()))
    with pytest.raises(AssertionError, match="sees another history"):
        step(scheduler)


def blocks_of_waiting_beams(scheduler: WatchedScheduler) -> list[int]:
    """Blocks of sequences that hold them and compute nothing, and of nobody else."""
    waits = [(s.candidates is not None, s.block_ids) for s in scheduler.running]
    used = {block for is_waiting, block_ids in waits if not is_waiting for block in block_ids}
    return sorted({block for _, block_ids in waits for block in block_ids} - used)


# Builds that lose no history, only what sharing is for: tests of it must notice.


def evict_the_youngest(monkeypatch: pytest.MonkeyPatch) -> None:
    free = BlockPool.free

    def to_the_front(self: BlockPool, block_ids: list[int]) -> None:
        free(self, block_ids)
        for block in [block for block in block_ids if block in self._cached_ids]:
            self._cached_ids.move_to_end(block, last=False)

    monkeypatch.setattr(BlockPool, "free", to_the_front)


def evict_heads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    free = BlockPool.free
    monkeypatch.setattr(BlockPool, "free", lambda self, block_ids: free(self, block_ids[::-1]))


def register_no_swapped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    register = planner.Planner._register

    def from_what_is_computed(self: Any, sequence: Sequence, _: int, end: int) -> None:
        register(self, sequence, sequence.num_computed_tokens, end)

    monkeypatch.setattr(planner.Planner, "_register", from_what_is_computed)


def evict_in_both_orders() -> None:
    test = test_sharing.test_a_miss_evicts_what_was_freed_longest_ago_and_a_tail_before_its_head
    test("ab", [3, 2, 1, 6, 5, 4])
    test("ba", [6, 5, 4, 3, 2, 1])


@pytest.mark.parametrize(
    ("break_it", "test"),
    [
        (evict_the_youngest, evict_in_both_orders),
        (evict_heads_first, evict_in_both_orders),
        (
            register_no_swapped_blocks,
            test_sharing.test_what_comes_back_from_host_memory_can_be_hit_again,
        ),
    ],
)
def test_a_wasteful_build_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    test: Callable[[], None],
):
    test()
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        test()
