"""`jpaged.show`: the pool and the block tables as a picture, for a notebook or a terminal."""

import dataclasses
import inspect
from collections.abc import Awaitable
from typing import Protocol, overload

from jpaged.picture_html import draw_html
from jpaged.picture_text import draw_text
from jpaged.scheduler import Scheduler
from jpaged.snapshot import Snapshot, take_snapshot


class Holder(Protocol):
    """An `LLM`, known by what it does: drawing needs no device."""

    def snapshot(self) -> Snapshot:
        """What it holds now."""
        ...


class AsyncHolder(Protocol):
    """An `AsyncLLM`, likewise."""

    async def snapshot(self) -> Snapshot:
        """What it holds once its thread has the time to say."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Picture:
    """The pool and the block tables at one moment: HTML in a notebook, text wherever it is printed.

    It holds no script, loads nothing, and fits light and dark pages alike.
    """

    snapshot: Snapshot

    def __repr__(self) -> str:
        return draw_text(self.snapshot)

    def _repr_html_(self) -> str:
        return draw_html(self.snapshot)


@overload
def show(source: Holder | Scheduler | Snapshot) -> Picture: ...
@overload
def show(source: AsyncHolder) -> Awaitable[Picture]: ...
def show(source: Holder | AsyncHolder | Scheduler | Snapshot) -> Picture | Awaitable[Picture]:
    """A picture of who holds which block of the pool, how full it is, and what is shared.

    `jpaged.show(llm)` between steps, while `stream` or `submit` and `step` run; of an `AsyncLLM`
    it is awaited, `await jpaged.show(llm)`, because the engine's thread takes the snapshot. A
    pool of more than a few hundred blocks is drawn with counts in place of neighbours alike.
    """
    if isinstance(source, Snapshot):
        return Picture(source)
    if isinstance(source, Scheduler):
        return Picture(take_snapshot(source))
    take = getattr(source, "snapshot", None)
    if take is None:
        raise TypeError(f"expected an LLM, AsyncLLM, Scheduler or Snapshot, got {source!r}")
    taken = take()
    return _picture_of(taken) if inspect.isawaitable(taken) else Picture(taken)


async def _picture_of(taken: Awaitable[Snapshot]) -> Picture:
    return Picture(await taken)
