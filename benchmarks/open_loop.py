"""Sends requests when their time has come, whatever becomes of those before them."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from benchmarks.arrivals import Arrival


class Progress(NamedTuple):
    """What a step brought, by the requests' numbers."""

    started: list[int]  # those that have got their place in memory
    tokens: dict[int, list[int]]  # the new ones


class Server(Protocol):
    """What answers: one side of a comparison."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        ...

    @property
    def num_held(self) -> int:
        """Requests that hold memory now."""
        ...

    def submit(self, number: int, arrival: Arrival) -> None:
        """Queues a request."""
        ...

    def step(self) -> Progress:
        """Runs one step and waits for what it brings."""
        ...


class Clock(Protocol):
    """Time in seconds, from any origin."""

    def now(self) -> float:
        """The time now."""
        ...

    def wait(self, seconds: float) -> None:
        """Lets so much time pass."""
        ...


class RealClock:
    """The machine's own."""

    def now(self) -> float:
        """The time now."""
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Lets so much time pass."""
        time.sleep(seconds)


@dataclasses.dataclass(kw_only=True)
class Served:
    """What became of one request; times are in seconds since the replay began.

    `arrival` is when it was due, not when a step had ended so that it could be taken in: waiting
    for a slow step is part of what its user waits for.
    """

    arrival: float
    num_prompt: int
    start: float | None = None  # of the first step that had room for it
    token_ids: list[int] = dataclasses.field(default_factory=list)
    token_times: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """All requests of one run, and how many of them were held in each step."""

    served: list[Served]
    held: list[tuple[float, int]]  # seconds that a step took, and requests in it
    seconds: float  # from the first arrival to the last token


def replay(server: Server, arrivals: Sequence[Arrival], clock: Clock) -> Replay:
    """Runs all arrivals to their end. A token's time is that at which its step returned."""
    served = [Served(arrival=a.seconds, num_prompt=len(a.prompt)) for a in arrivals]
    held: list[tuple[float, int]] = []
    due = collections.deque(enumerate(arrivals))
    origin = clock.now()
    now = 0.0
    while due or server.has_work:
        while due and due[0][1].seconds <= now:
            server.submit(*due.popleft())
        if server.has_work:
            begun = now
            progress = server.step()
            now = clock.now() - origin
            _note(progress, served, begun=begun, ended=now)
            # What ended in this step was held too, and every request that started is a user.
            held.append((now - begun, max(server.num_held, len(progress.tokens))))
        else:
            clock.wait(max(0.0, due[0][1].seconds - now))
            now = clock.now() - origin
    for arrival, one in zip(arrivals, served, strict=True):
        found, wanted = len(one.token_ids), arrival.max_tokens
        assert found == wanted, f"a request of {wanted} tokens ended with {found}"
    return Replay(served=served, held=held, seconds=max(one.token_times[-1] for one in served))


def _note(progress: Progress, served: list[Served], *, begun: float, ended: float) -> None:
    for number in progress.started:
        served[number].start = begun
    for number, token_ids in progress.tokens.items():
        served[number].token_ids += token_ids
        served[number].token_times += [ended] * len(token_ids)
