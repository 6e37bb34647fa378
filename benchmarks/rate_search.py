"""Finds the highest rate at which a side keeps the objective."""

import math
from collections.abc import Callable, Generator, Mapping

MAX_STEPS = 8  # doublings or halvings before a search gives up

Search = Generator[float, bool, None]


def search(start: float, *, num_bisections: int) -> Search:
    """Asks for rates, is sent whether each keeps the objective, and draws nearer to the border.

    It doubles from `start` until the objective is missed, or halves until it is kept, and then
    bisects, each time at the geometric mean: three bisections leave the border within a twelfth.
    """
    low = high = None
    rate = start
    for _ in range(MAX_STEPS):
        if (yield rate):
            low, rate = rate, 2 * rate
        else:
            high, rate = rate, rate / 2
        if low is not None and high is not None:
            break
    if low is None or high is None:
        return
    for _ in range(num_bisections):
        middle = math.sqrt(low * high)
        if (yield middle):
            low = middle
        else:
            high = middle


def take_turns(searches: Mapping[str, Search], ask: Callable[[str, float], bool]) -> None:
    """Runs all searches, a question of each in turn; `ask` answers for a side's name and a rate."""
    asked = {name: next(one) for name, one in searches.items()}
    while asked:
        for name, rate in list(asked.items()):
            try:
                asked[name] = searches[name].send(ask(name, rate))
            except StopIteration:
                del asked[name]


def highest_kept(kept: Mapping[float, bool]) -> float | None:
    """The highest rate that keeps the objective below the first that misses it, if any does."""
    highest = None
    for rate in sorted(kept):
        if not kept[rate]:
            break
        highest = rate
    return highest
