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

    def wants(self, shape_name: str) -> bool:
        """Whether a shape is to be measured."""
        return self.only is None or self.only in shape_name


# A name, and a flat dictionary; `"ok": False` in it makes the whole check fail.
Record = Callable[[str, dict], None]


def describe(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
