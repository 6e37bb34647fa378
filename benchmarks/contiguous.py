"""Contiguous reservation, as before paging: three allocators, and where their memory goes.

The shares are those of the paged-attention paper (Kwon et al., arXiv 2309.06180, figure 2): tokens
held now, slots reserved for tokens to come, slots reserved and never used (internal), and slots
that no waiting request fits (external).
"""

import bisect
import dataclasses
import heapq
from collections.abc import Sequence
from typing import Protocol

from benchmarks.lengths import RequestLengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of a pool's slots, averaged over steps; they add up to 1."""

    effective: float
    reserved: float
    internal: float
    external: float
    running: float  # requests at once, no share


class Allocator(Protocol):
    """Hands out ranges of slots."""

    def allocate(self, size: int) -> tuple[int, int] | None:
        """The start of a range and its real size, or None where nothing fits."""
        ...

    def free(self, start: int) -> None:
        """Gives a range back."""
        ...


class FirstFit:
    """Exact ranges, each in the first hole that is long enough."""

    def __init__(self, num_slots: int) -> None:
        self.holes: list[tuple[int, int]] = [(0, num_slots)]  # starts and sizes, by start
        self.sizes: dict[int, int] = {}

    def allocate(self, size: int) -> tuple[int, int] | None:
        """The start of a range and its size, or None where no hole is long enough."""
        for index, (start, room) in enumerate(self.holes):
            if room >= size:
                rest = [(start + size, room - size)] if room > size else []
                self.holes[index : index + 1] = rest
                self.sizes[start] = size
                return start, size
        return None

    def free(self, start: int) -> None:
        """Gives a range back, and joins it to the holes that it touches."""
        size = self.sizes.pop(start)
        index = bisect.bisect(self.holes, (start, 0))
        first = last = index
        if last < len(self.holes) and self.holes[last][0] == start + size:
            size += self.holes[last][1]
            last += 1
        if first and sum(self.holes[first - 1]) == start:
            first -= 1
            start, size = self.holes[first][0], size + self.holes[first][1]
        self.holes[first:last] = [(start, size)]


class Slabs(FirstFit):
    """Every range as long as the longest request."""

    def __init__(self, num_slots: int, slab_size: int) -> None:
        super().__init__(num_slots)
        self.slab_size = slab_size

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A slab, whatever `size` is."""
        assert size <= self.slab_size, "a slab holds the longest request"
        return super().allocate(self.slab_size)


class Buddies:
    """Powers of two that split in halves and merge with their other half (Knowlton, 1965)."""

    def __init__(self, num_slots: int) -> None:
        self.free_starts: dict[int, set[int]] = {
            1 << k: set() for k in range(num_slots.bit_length())
        }
        self.sizes: dict[int, int] = {}
        start = 0
        for size in reversed(self.free_starts):  # the pool as a sum of powers of two
            if num_slots & size:
                self.free_starts[size].add(start)
                start += size

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A range of the next power of two, or None where no free one is large enough."""
        wanted = 1 << (size - 1).bit_length()
        found = wanted
        while not self.free_starts.get(found):
            if found not in self.free_starts:
                return None
            found *= 2
        start = min(self.free_starts[found])
        self.free_starts[found].remove(start)
        while found > wanted:
            found //= 2
            self.free_starts[found].add(start + found)
        self.sizes[start] = wanted
        return start, wanted

    def free(self, start: int) -> None:
        """Gives a range back, and merges halves as far as they are both free."""
        size = self.sizes.pop(start)
        while start ^ size in self.free_starts[size]:
            self.free_starts[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self.free_starts[size].add(start)


def reserve(lengths: Sequence[RequestLengths], allocator: Allocator, *, num_slots: int) -> Shares:
    """The average over steps while requests wait, first come first served.

    A step computes a whole prompt, or one token of every request that runs, as the paged side's
    steps do. The first requests all begin at once, so the average begins when as many have ended
    as ran then, and ends when the last has begun.
    """
    waiting = iter(lengths)
    head = next(waiting, None)
    running: list[tuple[int, int, int, RequestLengths]] = []  # end, start of the range, size
    step = num_finished = num_steps = num_running = 0
    held = reserved = allocated = 0  # summed over steps
    first = 0
    while head is not None:
        while running and running[0][0] <= step:
            allocator.free(heapq.heappop(running)[1])
            num_finished += 1
        while head is not None:
            wanted = head.input_tokens + head.output_tokens
            given = allocator.allocate(wanted)
            if given is None:
                break
            heapq.heappush(running, (step + head.output_tokens, *given, head))
            head = next(waiting, None)
        assert running, "the pool holds the longest request"
        first = first or len(running)
        until = running[0][0]
        if num_finished >= first and head is not None:
            span = until - step
            num_steps += span
            num_running += span * len(running)
            for end, _, size, pair in running:
                age = step - (end - pair.output_tokens)
                held += span * (pair.input_tokens + age) + span * (span - 1) // 2
                reserved += span * (pair.input_tokens + pair.output_tokens)
                allocated += span * size
        step = until
    if not num_steps:
        raise ValueError(
            f"{len(lengths)} requests do not keep {num_slots} slots busy; give more requests"
        )
    total = num_steps * num_slots
    return Shares(
        effective=held / total,
        reserved=(reserved - held) / total,
        internal=(allocated - reserved) / total,
        external=1 - allocated / total,
        running=num_running / num_steps,
    )
