"""A snapshot says what the scheduler holds, and a trace adds up to what it counts."""

import random

import pytest

from jpaged.blocks import NULL_BLOCK
from jpaged.scheduler import Scheduler
from jpaged.snapshot import BlockKind, Snapshot, take_snapshot
from jpaged.stats import collect_stats
from jpaged.trace import StepRecord, StepRecorder
from tests.host.scripted import (
    InjectedError,
    interrupt,
    make_request,
    make_scheduler,
    run_to_end,
    scripted_tokens,
    step,
)


def assert_true_to(scheduler: Scheduler, snapshot: Snapshot) -> None:
    """Every block and every table is as the scheduler has it, and the figures are as in stats."""
    pool, stats = scheduler.pool, collect_stats(scheduler)
    assert [block.block_id for block in snapshot.blocks] == list(range(pool.num_blocks))
    assert [block.ref_count for block in snapshot.blocks] == pool.ref_counts
    assert [list(table.block_ids) for table in snapshot.tables] == [
        sequence.block_ids for sequence in scheduler.running
    ]
    assert [table.row for table in snapshot.tables] == [s.row for s in scheduler.running]
    for block in snapshot.blocks:
        holders = [i for i, t in enumerate(snapshot.tables) if block.block_id in t.block_ids]
        assert list(block.owners) == holders
        assert len(holders) == block.ref_count
        assert (block.kind is BlockKind.USED) == (block.ref_count > 0)
        assert (block.kind is BlockKind.NULL) == (block.block_id == NULL_BLOCK)
        assert (block.num_tokens > 0) == (block.kind in (BlockKind.USED, BlockKind.CACHED))
    assert snapshot.count(BlockKind.USED) == stats.blocks_used
    assert snapshot.count(BlockKind.CACHED) == stats.blocks_cached
    assert snapshot.count(BlockKind.FREE) == stats.blocks_free - stats.blocks_cached
    assert (snapshot.tokens_held, snapshot.num_waiting) == (stats.tokens_held, stats.waiting)
    assert (snapshot.waste, snapshot.saving) == (stats.waste, stats.saving)


def crowd(scheduler: Scheduler, rng: random.Random, count: int = 9) -> None:
    """More than the pool holds, with siblings and with prompts that begin alike."""
    for index in range(count):
        scheduler.add(
            make_request(
                str(index),
                rng.randrange(1, 40),
                seed=index,
                n=rng.choice([1, 1, 2, 3]),
                max_tokens=rng.randrange(1, 25),
            )
        )


@pytest.mark.parametrize("seed", range(5))
def test_snapshots_between_steps_agree_with_the_scheduler_and_its_stats(seed: int):
    scheduler, rng = make_scheduler(), random.Random(seed)
    crowd(scheduler, rng)
    assert_true_to(scheduler, take_snapshot(scheduler))
    num_shared = 0
    while scheduler.has_work:
        if rng.random() < 0.03:
            scheduler.abort(str(rng.randrange(9)))
        step(scheduler)
        snapshot = take_snapshot(scheduler)
        assert_true_to(scheduler, snapshot)
        num_shared += snapshot.num_shared
    assert num_shared


def test_a_snapshot_of_a_planned_step_holds_what_the_step_will_write():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 11))
    plan = scheduler.schedule()
    assert plan is not None
    snapshot = take_snapshot(scheduler)
    assert [b.num_tokens for b in snapshot.blocks if b.kind is BlockKind.USED] == [8, 3]
    assert snapshot.tables[0].num_computed_tokens == 11
    scheduler.commit(plan, scripted_tokens(plan))
    assert take_snapshot(scheduler).blocks == snapshot.blocks


def test_a_snapshot_does_not_change_when_the_scheduler_goes_on():
    scheduler = make_scheduler()
    crowd(scheduler, random.Random(3))
    step(scheduler)
    snapshot = take_snapshot(scheduler)
    shown = repr(snapshot)
    run_to_end(scheduler)
    assert repr(snapshot) == shown


def total(steps: list[StepRecord], name: str) -> int | float:
    return sum(record[name] for record in steps)


def assert_adds_up(scheduler: Scheduler, steps: list[StepRecord]) -> None:
    """The trace of everything since the start says what stats says."""
    stats, size = collect_stats(scheduler), scheduler.config.block_size
    for name, counted in {
        "tokens": stats.computed_tokens,
        "generated_tokens": stats.generated_tokens,
        "copied_blocks": stats.copied_blocks,
        "preemptions": stats.preemptions,
        "recoveries": stats.recoveries,
    }.items():
        assert total(steps, name) == counted, name
    assert max(record["blocks_used"] for record in steps) == stats.peak_blocks
    hit_rate = total(steps, "hit_tokens") / total(steps, "queried_tokens")
    assert hit_rate == stats.hit_rate
    slots = size * total(steps, "blocks_used")
    assert stats.mean_waste == pytest.approx(1 - total(steps, "tokens_held") / slots)
    entries = sum(r["blocks_used"] / (1 - r["saving"]) for r in steps)
    assert stats.mean_saving == pytest.approx(1 - total(steps, "blocks_used") / entries)
    for record in steps:
        assert 0 <= record["blocks_cached"] <= record["blocks_free"]
        assert record["blocks_used"] + record["blocks_free"] == stats.num_blocks - 1
        assert record["prefills"] + record["decodes"] <= record["running"]
        assert record["waste"] == pytest.approx(
            1 - record["tokens_held"] / (size * record["blocks_used"])
            if record["blocks_used"]
            else 0
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_trace_adds_up_to_the_stats(seed: int):
    scheduler = make_scheduler()
    recorder = StepRecorder(scheduler)
    crowd(scheduler, random.Random(seed), count=25)
    with recorder.trace() as steps:
        while recorder.run(lambda: step(scheduler)) is not None:
            pass
    stats = collect_stats(scheduler)
    assert stats.preemptions
    assert 0 < stats.mean_saving < 1
    assert [record["step"] for record in steps] == list(range(1, stats.steps + 1))
    times = [record["time"] for record in steps]
    assert times == sorted(times)
    assert all(0 <= record["seconds"] <= record["time"] for record in steps)
    assert_adds_up(scheduler, steps)


def test_a_step_that_fails_is_in_the_trace():
    scheduler = make_scheduler()
    recorder = StepRecorder(scheduler)
    crowd(scheduler, random.Random(1), count=4)

    def failing() -> None:
        assert scheduler.schedule() is not None
        scheduler.recover()

    with recorder.trace() as steps:
        recorder.run(failing)
        with interrupt(after=400), pytest.raises(InjectedError):
            recorder.run(lambda: scheduler.commit(scheduler.schedule(), []))  # pyright: ignore[reportArgumentType]
        scheduler.recover()
        while recorder.run(lambda: step(scheduler)) is not None:
            pass
    assert [steps[0]["recoveries"], steps[0]["generated_tokens"]] == [1, 0]
    assert total(steps, "tokens") == scheduler.counters.computed_tokens


def test_the_rows_of_a_step_are_told_apart():
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=64)
    recorder = StepRecorder(scheduler)
    with recorder.trace() as steps:
        scheduler.add(make_request("a", 21, n=3, max_tokens=4))
        recorder.run(lambda: step(scheduler))
        scheduler.add(make_request("b", 5, max_tokens=2))
        recorder.run(lambda: step(scheduler))
    rows = [(r["running"], r["prefills"], r["decodes"], r["tokens"]) for r in steps]
    assert rows == [(3, 1, 0, 21), (4, 1, 3, 8)]  # two answers fork, and run no token of their own
    assert (steps[0]["saving"], steps[0]["queried_tokens"]) == (1 - 3 / 9, 21)
    assert (steps[1]["copied_blocks"], steps[1]["queried_tokens"]) == (2, 5)


def test_idle_steps_and_steps_outside_a_trace_are_not_recorded():
    scheduler = make_scheduler()
    recorder = StepRecorder(scheduler)
    with recorder.trace() as outer:
        recorder.run(lambda: step(scheduler))
        assert outer == []
        scheduler.add(make_request("a", 3, max_tokens=3))
        recorder.run(lambda: step(scheduler))
        with recorder.trace() as inner:
            recorder.run(lambda: step(scheduler))
    recorder.run(lambda: step(scheduler))
    assert ([r["step"] for r in outer], [r["step"] for r in inner]) == ([1, 2], [1])
    timing = ("step", "time")
    without = [{k: v for k, v in r.items() if k not in timing} for r in (outer[1], inner[0])]
    assert without[0] == without[1]
