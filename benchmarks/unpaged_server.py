"""The unpaged baseline as one side of an open loop."""

import collections
import enum

import numpy as np

from benchmarks.arrivals import Arrival
from benchmarks.baseline import Baseline
from benchmarks.open_loop import Progress


class Refill(enum.Enum):
    """When the rows of a batch are given to new requests."""

    WHEN_ALL_ENDED = "all"  # a static batch
    WHEN_ONE_ENDED = "one"  # continuous batching, with the same reservation


class UnpagedServer:
    """Takes whoever waits into the rows that are free, in order of arrival.

    A static batch does not wait until it is full: it begins when there is a request, and others
    join until its first decode step. Each prompt's first token is told as soon as it is known.
    """

    def __init__(self, baseline: Baseline, refill: Refill) -> None:
        self._baseline = baseline
        self._refill = refill
        self._rows = baseline.empty_rows()
        self._stop_ids = baseline.stop_ids(ignore_eos=True)
        self._waiting: collections.deque[tuple[int, Arrival]] = collections.deque()
        self._numbers: dict[int, int] = {}  # of the requests, by row
        self._is_open = True  # whether the batch has not decoded yet

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._waiting or self._numbers)

    @property
    def num_held(self) -> int:
        """Rows in use."""
        return len(self._numbers)

    def submit(self, number: int, arrival: Arrival) -> None:
        """Queues a request."""
        self._baseline.check_lengths(len(arrival.prompt), arrival.max_tokens)
        self._waiting.append((number, arrival))

    def step(self) -> Progress:
        """Computes one prompt, if a row may be filled, or else a token for every row in use."""
        free = [row for row in range(self._baseline.num_rows) if row not in self._numbers]
        may_fill = self._is_open or self._refill is Refill.WHEN_ONE_ENDED
        started = []
        if self._waiting and free and may_fill:
            number, arrival = self._waiting.popleft()
            self._numbers[free[0]] = number
            self._rows = self._baseline.start_row(
                self._rows, free[0], arrival.prompt, arrival.max_tokens, self._stop_ids
            )
            started, told = [number], [free[0]]
        else:
            self._is_open = False
            self._rows = self._baseline.step(self._rows, self._stop_ids)
            told = list(self._numbers)
        return Progress(started, self._take_in(told))

    def _take_in(self, told: list[int]) -> dict[int, list[int]]:
        """The new tokens of these rows; those that have ended are free again."""
        tokens, lens = np.array(self._rows.tokens), np.array(self._rows.lens)
        news = {self._numbers[row]: [int(tokens[row])] for row in told}
        for row in told:
            if lens[row] == 0:
                del self._numbers[row]
        self._is_open = self._is_open or not self._numbers
        return news
