"""The search for the highest rate that a side serves within the objective."""

import math

import pytest

from benchmarks.rate_search import MAX_STEPS, highest_kept, search, take_turns


def found(limit: float, start: float, *, num_bisections: int = 3) -> tuple[list[float], float]:
    """The rates that are asked for where `limit` is the highest that is kept, and the result."""
    kept: dict[float, bool] = {}

    def ask(_: str, rate: float) -> bool:
        assert rate not in kept, "no rate is measured twice"
        kept[rate] = rate <= limit
        return kept[rate]

    take_turns({"one": search(start, num_bisections=num_bisections)}, ask)
    highest = highest_kept(kept)
    assert highest is not None
    return list(kept), highest


def test_it_doubles_until_the_objective_is_missed_and_then_bisects():
    rates, highest = found(3.1, 0.5, num_bisections=2)
    assert rates == pytest.approx([0.5, 1, 2, 4, 2 * 2**0.5, 2 * 2**0.75])
    assert highest == pytest.approx(2 * 2**0.5)


def test_it_halves_where_the_first_rate_misses():
    rates, highest = found(0.3, 1.0, num_bisections=1)
    assert rates == pytest.approx([1, 0.5, 0.25, 0.25 * 2**0.5])
    assert highest == 0.25


@pytest.mark.parametrize("limit", [0.07, 0.6, 1.0, 5.3])
def test_three_bisections_leave_the_border_within_a_twelfth(limit: float):
    _, highest = found(limit, 1.0)
    assert highest <= limit < highest * 2 ** (1 / 8) * 1.001


@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_it_gives_up_where_nothing_or_everything_is_kept(limit: float):
    asked = []

    def ask(_: str, rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    take_turns({"one": search(1.0, num_bisections=3)}, ask)
    assert len(asked) == MAX_STEPS


def test_sides_take_turns_until_each_has_its_answer():
    turns = []

    def ask(name: str, rate: float) -> bool:
        turns.append(name)
        return rate <= {"a": 1, "b": 9}[name]

    take_turns({name: search(1.0, num_bisections=1) for name in "ab"}, ask)
    assert "".join(turns) == "ababab" + "bbb"


def test_what_is_kept_above_a_rate_that_is_not_does_not_count():
    assert highest_kept({2.0: False, 0.5: True, 4.0: True, 1.0: True}) == 1.0
    assert highest_kept({1.0: False}) is None
    assert highest_kept({}) is None
