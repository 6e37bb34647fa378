"""The scheduler's rules, one by one; test_scheduler_random.py mixes them."""

from typing import Any

import pytest

from jpaged.errors import QueueFullError
from jpaged.invariants import check
from jpaged.outputs import Logprob, request_output
from jpaged.stats import collect_stats
from tests.host.scripted import (
    EOS,
    assert_undisturbed,
    make_request,
    make_scheduler,
    run_to_end,
    scripted_tokens,
    step,
)


def test_a_prompt_is_cut_into_chunks_of_the_budget_and_samples_after_the_last():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 25))
    rows = []
    for _ in range(4):
        plan = step(scheduler)
        assert plan is not None
        rows += [(row.start, row.num_tokens, row.samples, row.is_new) for row in plan.rows]
    assert rows == [
        (0, 11, False, True),
        (11, 11, False, False),
        (22, 3, True, False),
        (25, 1, True, False),
    ]


def test_only_a_token_that_the_device_sampled_on_this_row_is_fed_back():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 1))
    first, second = step(scheduler), step(scheduler)
    assert first is not None
    assert second is not None
    assert [row.feeds_back for row in first.rows] == [False]
    assert [row.feeds_back for row in second.rows] == [True]


def test_new_blocks_name_their_columns():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 15, max_tokens=8))
    columns = []
    while (plan := step(scheduler)) is not None:
        columns.append([column for column, _ in plan.rows[0].new_blocks])
    # 11 tokens take two blocks, the other 4 fit, the token after position 15 opens the third.
    assert columns == [[0, 1], [], [], [2], [], [], [], [], []]


def test_decodes_come_before_chunks_and_every_running_sequence_gets_a_token():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    step(scheduler)
    scheduler.add(make_request("b", 21))
    scheduler.add(make_request("c", 5))
    plan = step(scheduler)
    assert plan is not None
    assert [(row.sequence.request.request_id, row.num_tokens) for row in plan.rows] == [
        ("a", 1),
        ("b", 10),
    ]
    assert plan.num_decodes == 1
    assert scheduler.num_waiting == 1


def test_never_more_sequences_run_than_a_step_has_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=3)
    for name in "abcde":
        scheduler.add(make_request(name, 2))
    most = 0
    while step(scheduler) is not None:
        most = max(most, scheduler.num_running)
    assert most == 3


def test_a_prompt_without_room_for_a_token_is_refused_with_both_numbers():
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match="70 tokens and max_model_len is 70"):
        scheduler.add(make_request("a", 70))
    assert not scheduler.has_work


def test_what_can_never_fit_the_pool_is_refused_with_both_numbers_before_anything_changes():
    scheduler = make_scheduler(num_blocks=5)
    with pytest.raises(ValueError, match="may need 5 blocks of 8 tokens and the pool has 4"):
        scheduler.add(make_request("a", 20, max_tokens=14))
    with pytest.raises(ValueError, match="max_tokens=None may need 9 blocks"):
        scheduler.add(make_request("b", 3, max_tokens=None))
    check(scheduler)
    assert not scheduler.has_work
    scheduler.add(make_request("a", 20, max_tokens=13))
    run_to_end(scheduler)


def test_an_empty_prompt_and_a_name_in_use_are_refused():
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match="at least one token"):
        scheduler.add(make_request("a", 0))
    scheduler.add(make_request("a", 2))
    with pytest.raises(ValueError, match="'a' is in use"):
        scheduler.add(make_request("a", 3))


def test_a_full_queue_says_so_and_takes_nothing():
    scheduler = make_scheduler(max_waiting=4)
    scheduler.add(make_request("a", 2, n=3))
    with pytest.raises(QueueFullError, match="3 sequences wait, 2 more came, and max_waiting is 4"):
        scheduler.add(make_request("b", 2, n=2))
    with pytest.raises(ValueError, match=r"has 5 sequences, .* max_waiting is 4; lower n"):
        scheduler.add(make_request("b", 2, n=5))
    check(scheduler)
    assert list(scheduler.requests) == ["a"]


def test_a_sequence_waits_until_all_its_known_tokens_have_free_blocks():
    scheduler = make_scheduler(num_blocks=8, enable_prefix_caching=False)  # seven blocks
    scheduler.add(make_request("a", 30, max_tokens=4))  # four blocks, over three steps
    step(scheduler)
    scheduler.add(make_request("b", 20, max_tokens=3))  # three are free, but a may want one
    for _ in range(5):
        plan = step(scheduler)
        assert plan is not None
        assert scheduler.num_waiting == 1
        assert plan.num_tokens < 11 or plan.rows[0].start < 22  # the budget was no reason
    run_to_end(scheduler)
    assert scheduler.counters.preemptions == 0


def test_the_latest_arrival_is_preempted_and_computed_again_to_the_same_end():
    scheduler = make_scheduler(num_blocks=9, max_num_batched_tokens=50)
    requests = [make_request(name, 15, seed=seed, max_tokens=20) for seed, name in enumerate("abc")]
    for request in requests:
        scheduler.add(request)
    preempted = []
    while (plan := step(scheduler)) is not None:
        preempted += [sequence.request.request_id for sequence in plan.preempted]
        if plan.preempted:
            assert not any(row.is_new for row in plan.rows)
            assert scheduler.waiting
    assert preempted[0] == "c"
    assert "a" not in preempted
    for request in requests:
        assert_undisturbed(request.sequences[0], 70)
    assert scheduler.counters.preemptions == len(preempted)


def test_a_preempted_sequence_is_new_again_with_its_generated_tokens_known():
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=30)
    scheduler.add(make_request("a", 14, max_tokens=18))
    scheduler.add(make_request("b", 13, max_tokens=9))
    returns = []
    while (plan := step(scheduler)) is not None:
        returns += [
            row for row in plan.rows if row.is_new and row.sequence.request.request_id == "b"
        ]
    # Its first block is that of "a"; later there is a second that begins like its own.
    assert [row.start for row in returns] == [8, 13]
    assert returns[1].seq_len > 13
    assert not returns[1].feeds_back


def test_each_of_n_sequences_has_its_own_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    request = make_request("a", 9, n=3)
    scheduler.add(request)
    plan = step(scheduler)
    assert plan is not None
    assert len(plan.rows) == 3
    run_to_end(scheduler)
    for sequence in request.sequences:
        assert_undisturbed(sequence, 70)
    assert len({tuple(sequence.output_token_ids) for sequence in request.sequences}) == 3


def test_more_sequences_than_rows_take_turns():
    scheduler = make_scheduler()
    request = make_request("a", 3, n=13)
    scheduler.add(request)
    run_to_end(scheduler)
    for sequence in request.sequences:
        assert_undisturbed(sequence, 70)


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason", "text"),
    [
        ({"ignore_eos": False}, [0, EOS, 1], "stop", None, "a"),
        ({"max_tokens": 3}, [0, EOS, 1], "length", None, "agb"),
        ({"stop_token_ids": [2]}, [0, 2], "stop", 2, "a"),
        ({"stop_token_ids": [2], "include_stop_str_in_output": True}, [0, 2], "stop", 2, "ac"),
        ({"stop_token_ids": [2], "min_tokens": 2}, [0, 2, 1, 2], "stop", 2, "acb"),
        ({"stop": "bc"}, [0, 1, 2], "stop", "bc", "a"),
        ({"stop": ["x", "bc"], "include_stop_str_in_output": True}, [1, 2], "stop", "bc", "bc"),
        ({"stop": "bc", "max_tokens": 2}, [0, 1], "length", None, "ab"),
        ({"stop": "bc", "max_tokens": 2}, [1, 2], "stop", "bc", ""),
        ({"stop": "a", "min_tokens": 1}, [0, 1, 0], "stop", "a", "ab"),
        ({"stop": "ab", "min_tokens": 1}, [0, 1], "stop", "ab", ""),
    ],
)
def test_a_sequence_ends_for_the_right_reason_with_the_right_text(
    params: dict[str, Any], tokens: list[int], reason: str, stop_reason: object, text: str
):
    scheduler = make_scheduler()
    request = make_request("a", 5, **params)
    scheduler.add(request)
    used = []
    for token in tokens:
        plan = scheduler.schedule()
        if plan is None:
            break
        used.append(token)
        scheduler.commit(plan, [token])
    check(scheduler)
    output = request_output(request).outputs[0]
    assert (output.finish_reason, output.stop_reason, output.text) == (reason, stop_reason, text)
    assert output.token_ids == used
    assert not scheduler.has_work


def test_generation_that_reaches_the_context_ends_with_length():
    scheduler = make_scheduler(max_model_len=20)
    request = make_request("a", 17, max_tokens=None)
    scheduler.add(request)
    run_to_end(scheduler)
    assert request.sequences[0].finish_reason == "length"
    assert request.sequences[0].num_tokens == 20


def test_an_abort_frees_running_and_waiting_sequences_alike():
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_request(name, 9, n=2))
    step(scheduler)
    assert scheduler.abort("unknown") == []
    for name in "cab":
        assert [sequence.finish_reason for sequence in scheduler.abort(name)] == ["abort"] * 2
        check(scheduler)
    assert scheduler.abort("a") == []
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_a_request_aborted_while_its_step_runs_gets_no_token_of_it():
    scheduler = make_scheduler(max_num_batched_tokens=40)
    first, second = make_request("a", 9), make_request("b", 7)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    check(scheduler, plan)
    changed = scheduler.commit(plan, scripted_tokens(plan))
    check(scheduler)
    assert changed == second.sequences
    assert first.sequences[0].output_token_ids == []
    run_to_end(scheduler)
    assert_undisturbed(second.sequences[0], 70)


def test_failed_requests_end_with_their_error_and_the_others_go_on():
    scheduler = make_scheduler()
    bad, good = make_request("bad", 9), make_request("good", 7)
    scheduler.add(bad)
    scheduler.add(good)
    step(scheduler)
    error = RuntimeError("the device is gone")
    scheduler.recover()
    assert scheduler.fail([bad], error) == bad.sequences
    check(scheduler)
    assert (bad.error, bad.sequences[0].finish_reason) == (error, "error")
    run_to_end(scheduler)
    assert_undisturbed(good.sequences[0], 70)


def test_a_plan_is_committed_once_with_a_token_for_each_row():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="1 rows, got 2 token ids"):
        scheduler.commit(plan, [0, 1])
    assert scheduler.commit(plan, [0])
    assert scheduler.commit(plan, [0]) == []
    check(scheduler)


def test_of_a_plan_that_was_given_up_nothing_is_taken():
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.recover()
    assert scheduler.commit(plan, [0]) == []
    check(scheduler)
    run_to_end(scheduler)
    assert_undisturbed(request.sequences[0], 70)


def test_logprobs_are_kept_with_their_tokens_and_summed():
    scheduler = make_scheduler()
    request = make_request("a", 2, max_tokens=3, logprobs=0)
    scheduler.add(request)
    for token, logprob in ((4, -0.5), (2, -0.25), (1, -1.0)):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, [token], [{token: Logprob(logprob, rank=1)}])
    output = request_output(request).outputs[0]
    assert output.cumulative_logprob == -1.75
    assert output.logprobs is not None
    assert [list(entry) for entry in output.logprobs] == [[4], [2], [1]]


def test_stats_count_what_is_held_and_what_was_done():
    scheduler = make_scheduler()
    assert collect_stats(scheduler).waste == 0.0
    scheduler.add(make_request("a", 9, max_tokens=2))
    scheduler.add(make_request("b", 3, max_tokens=2))
    step(scheduler)
    stats = collect_stats(scheduler)
    # Nine tokens in two blocks, and two of b's three in one: the budget is eleven.
    assert (stats.running, stats.tokens_held, stats.blocks_used, stats.blocks_free) == (
        2,
        11,
        3,
        10,
    )
    assert stats.waste == pytest.approx(1 - 11 / 24)
    assert stats.mean_waste == stats.waste
    run_to_end(scheduler)
    stats = collect_stats(scheduler)
    assert (stats.steps, stats.generated_tokens, stats.prompt_tokens) == (3, 4, 12)
    assert (stats.peak_blocks, stats.blocks_used, stats.waste) == (3, 0, 0.0)
    assert stats.computed_tokens == 14


def test_ten_thousand_waiting_requests_are_not_looked_at_by_a_step():
    scheduler = make_scheduler()
    for index in range(10_000):
        scheduler.add(make_request(str(index), 60, max_tokens=9))
    plan = step(scheduler)
    assert plan is not None
    assert len(plan.rows) == 1
    scheduler.abort("7000")
    scheduler.abort("9999")
    check(scheduler)
    assert scheduler.num_waiting == 9_997


def test_the_shown_output_is_short_enough_for_a_notebook():
    request = make_request("a", 90)
    shown = repr(request_output(request))
    assert "prompt=<90 tokens>" in shown
    assert "CompletionOutput(index=0, text='', token_ids=<0 tokens>, finish_reason=None)" in shown
