"""What a figure consists of: lines, each of them a side that answers the same requests."""

import argparse
import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.arrivals import Trace
from benchmarks.serving_sides import Side, paged_side
from jpaged import LLM


class Axis(enum.Enum):
    """What a figure's points differ in, from left to right."""

    REQUEST_RATE = "request_rate"
    BLOCK_SIZE = "block_size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, and the panel in which all that answer them are drawn beside each other."""

    panel: str
    trace: Trace
    prompts: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One side and what it is sent, at every rate."""

    workload: Workload
    side: Side
    llm: LLM | None = None  # the side's engine, where it has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A figure that can be measured: everything is loaded, compiled and warm."""

    lines: list[Line]
    llms: list[LLM]  # to be closed when it is done
    model_source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the paper's figures.

    `defaults` are its values of the options that are not given; an option of some figures only is
    of this one if it has a default here.
    """

    of_paper: str  # its number there
    title: str
    axis: Axis
    defaults: Mapping[str, Any]
    longest: Callable[[argparse.Namespace], int]  # tokens that one request may need
    make: Callable[[argparse.Namespace], Made]

    def block_sizes(self, options: argparse.Namespace) -> list[int]:
        """Of all its engines."""
        by_size = self.axis is Axis.BLOCK_SIZE
        return options.block_sizes if by_size else [options.block_size]


def engine_line(name: str, llm: LLM, workload: Workload) -> Line:
    """An engine's line, under the name of its side."""
    return Line(workload=workload, side=paged_side(name, llm), llm=llm)
