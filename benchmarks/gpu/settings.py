"""What every part is told, and how it tells what it found."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one run."""

    backend: str  # the kernels under test
    scale: str  # "full", or "toy" for a run of the harness itself
    seed: int  # of all random inputs: a new one every run
    candidates: list[str]  # files of other configurations to time
    read_gbps: float | None  # the measured ceiling, where it is known
    only: str | None = None  # shapes whose name contains this
    known: tuple[str, ...] = ()  # names of results that an earlier run of the same has found
    origin: dict[str, str] = dataclasses.field(default_factory=dict)  # `reports.py` says of what

    def wants(self, shape_name: str) -> bool:
        """Whether a shape is to be measured."""
        return self.only is None or self.only in shape_name

    def lacks(self, result_name: str) -> bool:
        """Whether a result is still to be found."""
        return result_name not in self.known


class Record:
    """What a part has found, by name, and what it is at: whoever kills it wants to say where.

    A result is a flat dictionary; `"ok": False` in it makes the whole check fail. `changed` is
    called whenever there is more to know.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.results: dict[str, dict] = {}
        self.running: str | None = None
        self._changed = changed

    def begin(self, name: str) -> None:
        """Says that the result of this name is being found."""
        self.running = name
        self._changed()

    def __call__(self, name: str, result: dict) -> None:
        """Adds a result."""
        self.results[name] = result
        self.running = None
        self._changed()


def describe(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
