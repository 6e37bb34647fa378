"""The waiting queue against a sorted list, and what it costs when it is long."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import waiting
from jpaged.requests import MAX_OVERTAKEN, Sequence
from jpaged.waiting import WaitingQueue
from tests.host.scripted import make_request

NUM_CONSIDERED = 5  # here, so that short queues have more than a front


def make_sequences(priorities: list[int]) -> list[Sequence]:
    """Two sequences for each priority, in order of arrival."""
    requests = [make_request(str(i), 3, priority=p, n=2) for i, p in enumerate(priorities)]
    for arrival, request in enumerate(requests):
        request.arrival = arrival
    return [sequence for request in requests for sequence in request.sequences]


def assert_equal(queue: WaitingQueue, expected: list[Sequence]) -> None:
    expected = sorted(expected, key=lambda sequence: sequence.order)
    assert list(queue) == expected
    assert len(queue) == len(expected)
    assert queue.front == expected[:NUM_CONSIDERED]
    assert queue._gone <= {entry[1] for entry in queue._rest}
    if expected:
        best = expected[0].request.priority
        assert queue.best_priority == best
        assert queue.candidates == [s for s in queue.front if s.request.priority == best]


@settings(max_examples=300, deadline=None)
@given(
    priorities=st.lists(st.integers(-2, 2), min_size=1, max_size=12),
    choices=st.lists(st.integers(0, 999), max_size=120),
)
def test_a_queue_is_a_sorted_list(priorities: list[int], choices: list[int]):
    sequences = make_sequences(priorities)
    model: list[Sequence] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(waiting, "NUM_CONSIDERED", NUM_CONSIDERED)
        queue = WaitingQueue()
        for choice in choices:
            sequence = sequences[choice % len(sequences)]
            if sequence not in model:
                queue.add(sequence)
                model.append(sequence)
            elif choice % 3 and sequence in queue.candidates:
                before = [s.patience for s in queue.front]
                position = queue.front.index(sequence)
                front = list(queue.front)
                queue.start(sequence)
                model.remove(sequence)
                lost = [a - s.patience for a, s in zip(before, front, strict=True)]
                assert lost == [1] * position + [0] * (len(front) - position)
            else:
                in_front = sequence in queue.front
                queue.remove(sequence)
                model.remove(sequence)
                assert in_front or 2 * len(queue._gone) <= len(queue._rest)
            assert_equal(queue, model)


def test_what_is_not_in_front_cannot_leave_it():
    first, _, third, _ = make_sequences([0, 0])
    queue = WaitingQueue()
    queue.add(third)
    with pytest.raises(AssertionError, match="only what waits can leave"):
        queue.remove(first)


def test_ten_thousand_aborted_from_the_middle_leave_nothing_behind():
    rng = random.Random(2)
    sequences = make_sequences([rng.randrange(3) for _ in range(5_000)])
    queue = WaitingQueue()
    for sequence in sequences:
        queue.add(sequence)
    kept = set(rng.sample(sequences, 7))
    for sequence in rng.sample(sequences, len(sequences)):
        if sequence not in kept:
            queue.remove(sequence)
    assert list(queue) == sorted(kept, key=lambda sequence: sequence.order)
    assert (queue._rest, queue._gone) == ([], set())
    assert {sequence.patience for sequence in sequences} == {MAX_OVERTAKEN}
