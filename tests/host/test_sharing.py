"""What sequences share: cached prefixes, forks, copies."""

from typing import Any

import pytest

from benchmarks.oracle import WatchedScheduler
from jpaged.config import EngineConfig
from jpaged.invariants import check
from jpaged.prefix_cache import chain_digests, root_digest
from jpaged.requests import Request
from jpaged.stats import collect_stats
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


@pytest.mark.parametrize(
    ("order", "blank"), [("ab", [5, 4, 6, 7, 8, 9, 10]), ("ba", [4, 5, 6, 7, 8, 9, 10])]
)
def test_a_miss_takes_blank_blocks_and_then_a_shared_tail_before_its_head(
    order: str, blank: list[int]
):
    scheduler = scheduler_of_ten()
    scheduler.add(ask("a", [*COMMON, *[3] * 7]))
    step(scheduler)
    scheduler.add(ask("b", [*COMMON, *[4] * 5]))
    step(scheduler)
    tables = [scheduler.requests[name].sequences[0].block_ids for name in "ab"]
    assert tables == [[1, 2, 3, 4], [1, 2, 3, 5]]
    for name in order:
        scheduler.abort(name)
    assert blocks_of_a_miss(scheduler) == [*blank, 3, 2, 1]


@pytest.mark.parametrize(
    ("order", "evicted"), [("ab", [3, 2, 1, 6, 5, 4]), ("ba", [6, 5, 4, 3, 2, 1])]
)
def test_a_miss_evicts_what_was_freed_longest_ago_and_a_tail_before_its_head(
    order: str, evicted: list[int]
):
    scheduler = scheduler_of_ten()
    for name, first in (("a", 0), ("b", 50)):
        scheduler.add(ask(name, [first + token for token in COMMON]))
    step(scheduler)
    tables = [scheduler.requests[name].sequences[0].block_ids for name in "ab"]
    assert tables == [[1, 2, 3], [4, 5, 6]]
    for name in order:
        scheduler.abort(name)
    assert scheduler.pool.num_cached == 6
    assert blocks_of_a_miss(scheduler) == [7, 8, 9, 10, *evicted]


def blocks_of_a_miss(scheduler: WatchedScheduler) -> list[int]:
    """The blocks of 160 tokens that nobody knows: all that there are."""
    scheduler.add(ask("miss", list(range(100, 260)), max_tokens=1))
    hits_before = scheduler.counters.hit_tokens
    plan = step(scheduler)
    assert plan is not None
    assert scheduler.counters.hit_tokens == hits_before
    assert scheduler.pool.num_cached == 10  # its own
    return [block for _, block in plan.rows[0].new_blocks]


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


def test_what_comes_back_from_host_memory_can_be_hit_again():
    scheduler = make_scheduler(num_blocks=9, max_num_batched_tokens=64, num_swap_blocks=5)
    scheduler.add(ask("a", [1] * 20, max_tokens=40))
    scheduler.add(ask("b", [2] * 20, max_tokens=40))
    plan = step(scheduler)
    while plan is not None and not plan.swap_ins:
        plan = step(scheduler)
    assert plan is not None, "nothing came back"
    (row,) = plan.rows  # "a" has ended, and needed all blocks before
    assert scheduler.counters.hit_tokens == 0
    num_full = row.seq_len // 8
    assert num_full >= 3
    scheduler.add(ask("c", [*row.sequence.token_ids[: 8 * num_full], 3]))
    plan = step(scheduler)
    assert plan is not None
    assert [row.start for row in plan.rows if row.is_new] == [8 * num_full]
    b, c = (scheduler.requests[name].sequences[0] for name in "bc")
    assert c.block_ids[:num_full] == b.block_ids[:num_full]
    run_to_end(scheduler)


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
