"""What the scheduler does about tokens that are sampled and not known yet."""

from jpaged.invariants import check
from tests.host.scripted import (
    assert_undisturbed,
    commit,
    make_request,
    make_scheduler,
    run_to_end,
    scripted_token,
    step_ahead,
)


def test_blocks_that_answers_fill_can_be_hit():
    scheduler = make_scheduler()
    first = make_request("first", 5, max_tokens=22)
    scheduler.add(first)
    while scheduler.has_work:
        step_ahead(scheduler)
    # Of 27 tokens the last was never computed: three blocks of eight are whole.
    (sequence,) = first.sequences
    scheduler.add(make_request("again", 5, tail=[*sequence.output_token_ids, 3]))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_hit == 24


def test_whoever_ends_with_the_tokens_in_flight_is_preempted_for_nobody():
    # Of eight blocks the prompts take six, and two sequences go on.
    scheduler = make_scheduler(num_blocks=9, max_num_batched_tokens=60, enable_prefix_caching=False)
    requests = [make_request(n, 15, max_tokens=m) for n, m in (("a", 2), ("b", 9), ("c", 9))]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step_ahead(scheduler)
    assert scheduler.counters.preemptions == 0
    for request in requests:
        assert_undisturbed(request.sequences[0], 70)


def test_no_plan_is_made_that_would_preempt_before_the_tokens_are_known():
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=40, enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(make_request(name, 15, max_tokens=9))
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert all(plan is not None for plan in plans)  # the second fills all blocks but one
    commit(scheduler, scheduler.in_flight[0])
    assert scheduler.schedule() is None
    commit(scheduler, scheduler.in_flight[0])
    plan = scheduler.schedule()
    assert plan is not None
    assert [sequence.request.request_id for sequence in plan.preempted] == ["b"]
    check(scheduler, plan)


def test_a_token_reaches_one_that_has_lost_its_row_since():
    """Who comes last may be preempted with a token in flight, when others share the blocks out.

    `q` overtakes `p`, whose prompt then goes on; `r`, of a better priority, takes cached blocks
    that `p` was to have.
    """
    scheduler = make_scheduler(num_blocks=13, max_num_batched_tokens=24)
    for name, tail in (("warms q", [0]), ("warms r", [4] * 24 + [0])):
        num_shared = 16 if name == "warms q" else 0
        scheduler.add(make_request(name, num_shared, tail=tail, max_tokens=1))
        run_to_end(scheduler)
    p = make_request("p", 0, tail=[3] * 60, seed=2)
    q = make_request("q", 16, tail=[2], seed=3, max_tokens=20)
    r = make_request("r", 0, tail=[4] * 24 + [2], seed=4, priority=-1)
    scheduler.add(p)
    scheduler.add(q)
    assert scheduler.schedule() is not None
    scheduler.add(r)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.preempted == tuple(q.sequences)
    assert q.sequences[0].num_in_flight == 1
    check(scheduler, plan)
    while scheduler.has_work:
        step_ahead(scheduler)
    for request in (p, q, r):
        assert_undisturbed(request.sequences[0], 70)


def test_a_surplus_token_is_nobodys():
    scheduler = make_scheduler()
    request = make_request("a", 5, max_tokens=30)
    stop = scripted_token(request.sequences[0], 9)  # it may come earlier too
    request = make_request("a", 5, max_tokens=30, stop_token_ids=[stop])
    scheduler.add(request)
    while scheduler.has_work:
        step_ahead(scheduler)
    (sequence,) = request.sequences
    assert sequence.token_ids[-1] == stop
    assert sequence.token_ids.count(stop) == 1 + sequence.request.prompt_token_ids.count(stop)
    assert scheduler.in_flight == ()
    assert scheduler.counters.generated_tokens == sequence.num_output_tokens
    run_to_end(scheduler)
    check(scheduler)
