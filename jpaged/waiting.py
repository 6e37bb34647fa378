"""The sequences that wait, best first."""

import bisect
import heapq
import operator
from collections.abc import Iterator

from jpaged.requests import Sequence

NUM_CONSIDERED = 32  # that may start next: enough to find company for a prefix, few to look at

_order = operator.attrgetter("order")


class WaitingQueue:
    """Sequences in their order: by priority, then arrival, then index.

    `front` is the first `NUM_CONSIDERED` of them, sorted. The others are in a heap, where one that
    was removed stays until it comes up, or is swept out when more than half have gone. So adding,
    removing anywhere and refilling the front cost O(log n), and nothing looks at the whole.
    """

    def __init__(self) -> None:
        self.front: list[Sequence] = []
        self._rest: list[tuple[tuple[int, int, int], Sequence]] = []
        self._gone: set[Sequence] = set()  # in the heap and not in the queue

    def __len__(self) -> int:
        return len(self.front) + len(self._rest) - len(self._gone)

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence in order, sorted for this; not for the scheduler, which never needs it."""
        yield from self.front
        yield from (sequence for _, sequence in sorted(self._rest) if sequence not in self._gone)

    @property
    def best_priority(self) -> int:
        """Of those that wait; somebody does."""
        return self.front[0].request.priority

    @property
    def candidates(self) -> list[Sequence]:
        """Those of the front that have the best priority in the queue."""
        best = self.best_priority
        if self.front[-1].request.priority == best:
            return self.front
        return [sequence for sequence in self.front if sequence.request.priority == best]

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence where it belongs; it is not in the queue yet."""
        if sequence in self._gone:
            self._gone.remove(sequence)
            return
        bisect.insort(self.front, sequence, key=_order)
        if len(self.front) > NUM_CONSIDERED:
            last = self.front.pop()
            heapq.heappush(self._rest, (last.order, last))

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of the queue, wherever it stands."""
        position = bisect.bisect_left(self.front, sequence.order, key=_order)
        if position == len(self.front):
            self._gone.add(sequence)
            if 2 * len(self._gone) > len(self._rest):
                self._rest = [entry for entry in self._rest if entry[1] not in self._gone]
                self._gone.clear()
                heapq.heapify(self._rest)
            return
        assert self.front[position] is sequence, "only what waits can leave"
        del self.front[position]
        while self._rest and len(self.front) < NUM_CONSIDERED:
            _, following = heapq.heappop(self._rest)
            if following in self._gone:
                self._gone.remove(following)
            else:
                self.front.append(following)

    def start(self, sequence: Sequence) -> None:
        """Takes out one of the candidates, which overtakes all that stand before it."""
        for overtaken in self.front:
            if overtaken is sequence:
                break
            overtaken.patience -= 1
        self.remove(sequence)
