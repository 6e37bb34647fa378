"""Beams in the scheduler: what they share, who waits for whom, and pools that barely hold them."""

import random
from typing import Any

import pytest

from jpaged.beam_sequences import take_candidates
from jpaged.draft import Draft
from jpaged.invariants import check
from jpaged.planner import Planner
from jpaged.requests import Request
from jpaged.stats import collect_stats
from tests.host.scripted import (
    InjectedError,
    assert_beams_undisturbed,
    assert_request_undisturbed,
    commit,
    interrupt,
    make_beams,
    make_request,
    make_scheduler,
    run_to_end,
    scripted_tokens,
    step,
)


def test_the_prompt_is_computed_once_and_beams_share_what_they_have_in_common():
    scheduler = make_scheduler(max_num_batched_tokens=30, num_blocks=20)
    request = make_beams("a", 21, 3, max_tokens=20, ignore_eos=True)
    scheduler.add(request)
    plan = step(scheduler)
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [21, 0, 0]
    assert scheduler.pool.num_used == 3
    tables = [sequence.block_ids for sequence in request.sequences]
    assert tables[0] == tables[1] == tables[2]
    plan = step(scheduler)
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1, 1, 1]
    assert sorted(row.is_new for row in plan.rows) == [False, True, True]
    # Two of three copied the half full block, and the last to write there had it to itself.
    assert scheduler.counters.copied_blocks == 2
    assert scheduler.counters.computed_tokens == 21 + 3
    assert collect_stats(scheduler).saving == pytest.approx(1 - 5 / 9)
    run_to_end(scheduler)
    assert_beams_undisturbed(request)
    assert scheduler.counters.computed_tokens == 21 + 3 * 19


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("slack", [0, 1, 5])
def test_a_pool_that_just_holds_the_beams_is_enough(width: int, caching: bool, slack: int):
    """Others come before and after, so that beams wait, are preempted and wait for one another."""
    preemptions = 0
    for seed in range(12):
        rng = random.Random(seed)
        num_prompt, max_tokens = rng.randrange(1, 24), rng.randrange(16, 40)
        needed = blocks_for_beams(width, num_prompt, max_tokens, caching=caching)
        scheduler = make_scheduler(
            num_blocks=1 + needed + slack,
            max_num_seqs=width + rng.randrange(4),
            max_num_batched_tokens=width + rng.randrange(7),
            enable_prefix_caching=caching,
        )
        requests = [
            make_request("first", num_prompt, seed=seed, max_tokens=max_tokens),
            make_beams(
                "beams",
                num_prompt,
                width,
                seed=2 * seed + 1,  # odd: beams that part
                max_tokens=max_tokens,
                ignore_eos=seed % 3 > 0,
            ),
            make_request("between", num_prompt, seed=seed + 1, max_tokens=max_tokens),
            make_beams("more", num_prompt, width, seed=seed + 3, max_tokens=12, ignore_eos=True),
            make_request("last", rng.randrange(1, 9), seed=seed + 2, max_tokens=3),
        ]
        for request in requests:
            scheduler.add(request)
            for _ in range(rng.randrange(3)):
                step(scheduler)
        run_to_end(scheduler)
        assert_all_well(requests)
        preemptions += scheduler.counters.preemptions
    assert preemptions > 2


def blocks_for_beams(width: int, num_prompt: int, max_tokens: int, *, caching: bool) -> int:
    """Blocks of 8 that hold all beams but their last token, whole blocks of the prompt shared."""
    num_shared = (num_prompt - 1) // 8 if caching else 0
    return num_shared + width * (-(-(num_prompt + max_tokens - 1) // 8) - num_shared)


def test_a_beam_that_has_its_candidates_waits_for_those_that_were_preempted():
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=25)
    first = make_request("first", 20, max_tokens=40)
    beams = make_beams("beams", 9, 3, max_tokens=15, ignore_eos=True)
    waited = 0
    for request in (first, beams):
        scheduler.add(request)
    while step(scheduler) is not None:
        waited += sum(sequence.candidates is not None for sequence in scheduler.running)
    assert waited > 0
    assert scheduler.counters.preemptions > 0
    assert_all_well([first, beams])


def test_two_groups_of_beams_that_wait_for_rows_both_come_to_their_end():
    for seed in range(30):
        scheduler = make_scheduler(
            num_blocks=14, max_num_seqs=4, max_num_batched_tokens=4 + seed % 5
        )
        requests = [make_beams(str(i), 3 + 4 * i, 3 + i % 2, seed=seed + i) for i in range(5)]
        for request in requests:
            scheduler.add(request)
        run_to_end(scheduler)
        assert_all_well(requests)


def test_beams_that_wait_for_each_other_in_a_full_pool_make_room_in_order(
    monkeypatch: pytest.MonkeyPatch,
):
    """All that runs are beams of several searches, each of which lacks some that found no room."""
    admit, num_searching = Planner._admit_beam, []

    def counted(planner: Planner, draft: Draft) -> None:
        num_searching.append(len({sequence.request.request_id for sequence in planner.running}))
        admit(planner, draft)

    monkeypatch.setattr(Planner, "_admit_beam", counted)
    for seed in range(400):
        rng = random.Random(seed)
        width = rng.randrange(2, 6)
        num_prompt, max_tokens = rng.randrange(1, 20), rng.randrange(2, 30)
        caching = rng.random() < 0.7
        needed = max(
            blocks_for_beams(width, length, max_tokens, caching=caching)
            for length in range(1, num_prompt + 1)
        )
        scheduler = make_scheduler(
            num_blocks=1 + needed + rng.choice([0, 0, 1, 3]),
            max_num_seqs=width + rng.randrange(4),
            max_num_batched_tokens=width + rng.randrange(12),
            enable_prefix_caching=caching,
            num_swap_blocks=rng.choice([0, 0, 4, 30]),
        )
        most_steps, requests = rng.choice([1, 6, 6]), []
        for index in range(rng.randrange(2, 8)):
            requests.append(
                make_beams(
                    str(index),
                    rng.randrange(1, num_prompt + 1),
                    rng.randrange(2, width + 1),
                    seed=2 * rng.randrange(100) + 1,  # odd: beams that part
                    max_tokens=rng.randrange(1, max_tokens + 1),
                    ignore_eos=rng.random() < 0.7,
                    priority=rng.choice([0, 0, 1, -1]),
                )
            )
            scheduler.add(requests[-1])
            for _ in range(rng.randrange(most_steps)):
                step(scheduler)
        run_to_end(scheduler)
        assert_all_well(requests)
    assert len(num_searching) > 10
    assert max(num_searching) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 3}, "beam_width=4 needs .* allow 3"),
        ({"max_num_batched_tokens": 2}, "beam_width=4 needs .* allow 2"),
        ({"num_blocks": 9}, "4 beams may need 9 blocks of 8 tokens and the pool has 8"),
        (
            {"num_blocks": 12, "enable_prefix_caching": False},
            "4 beams may need 12 blocks of 8 tokens and the pool has 11",
        ),
    ],
)
def test_beams_that_could_never_all_run_at_once_are_refused(changes: dict[str, Any], message: str):
    scheduler = make_scheduler(**changes)
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_beams("a", 14, 4, max_tokens=5))
    assert not scheduler.has_work
    check(scheduler)


def test_only_the_best_n_are_returned():
    scheduler = make_scheduler()
    request = make_beams("a", 4, 4, n=2)
    scheduler.add(request)
    run_to_end(scheduler)
    assert_beams_undisturbed(request)
    assert request.returned == request.sequences[:2]
    scores = [s.hypothesis.score for s in request.sequences if s.hypothesis is not None]
    assert scores == sorted(scores, reverse=True)


def test_an_aborted_search_frees_everything_and_shows_what_it_had():
    scheduler = make_scheduler()
    request = make_beams("a", 9, 3, max_tokens=20, ignore_eos=True)
    scheduler.add(request)
    for _ in range(6):
        step(scheduler)
    ended = scheduler.abort("a")
    check(scheduler)
    assert ended == request.sequences
    assert scheduler.pool.num_used == 0
    for sequence in ended:
        assert (sequence.finish_reason, sequence.num_output_tokens) == ("abort", 6)
        assert sequence.text == "".join("abcdefg"[t] for t in sequence.output_token_ids)


def test_an_exception_at_any_bytecode_loses_no_beam_and_no_block():
    def scene() -> tuple[Any, list[Request]]:
        scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=13)
        requests = [
            make_request("0", 14, seed=8, max_tokens=19),
            make_beams("1", 9, 3, seed=2, max_tokens=7, ignore_eos=True),
            make_beams("2", 7, 2, seed=3, max_tokens=6, n=1, length_penalty=-1.0),
        ]
        return scheduler, requests

    def run(scheduler: Any, requests: list[Request]) -> None:
        for request in requests:
            scheduler.add(request)
        while (plan := scheduler.schedule()) is not None:
            commit(scheduler, plan)

    whole = scene()
    with interrupt(10**9) as count:
        run(*whole)
    assert_all_well(whole[1])
    assert whole[0].counters.preemptions > 0
    rng = random.Random(5)
    for after in rng.sample(range(count[0]), 120):
        scheduler, requests = scene()
        try:
            with interrupt(after):
                run(scheduler, requests)
        except InjectedError:
            scheduler.recover()
        check(scheduler)
        known = set(scheduler.requests.values())
        run_to_end(scheduler)
        assert_all_well([r for r in requests if r in known or r.finished])


def test_candidates_of_sequences_that_were_aborted_in_the_step_go_nowhere():
    scheduler = make_scheduler()
    request = make_beams("a", 4, 2)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    scheduler.commit(plan, scripted_tokens(plan))
    assert take_candidates(plan, [[(3, -1.0), (4, -2.0), (5, -3.0)]] * len(plan.rows)) == []
    check(scheduler)


def assert_all_well(requests: list[Request]) -> None:
    for request in requests:
        assert_request_undisturbed(request)
