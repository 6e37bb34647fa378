"""The engine's programs by name: each is compiled once, and says what goes in and comes out."""

import dataclasses
import enum

from jpaged.buckets import Bucket, Buckets
from jpaged.config import EngineConfig


class Outputs(enum.Enum):
    """What a step returns beside the tokens; all but TOKENS are compiled when asked for."""

    TOKENS = "tokens"
    LOGPROBS = "logprobs"
    BEAMS = "beams"  # log-probabilities of as many tokens as a beam has candidates
    LOGITS = "logits"  # of every token, for tests: [T, V]


@dataclasses.dataclass(frozen=True)
class Zeros:
    """`() -> (pool, state)`: both hold nothing."""


@dataclasses.dataclass(frozen=True)
class PlainStep:
    """`(params, pool, state, packed batch) -> (pool, state, out)`: a step of one bucket."""

    bucket: Bucket
    outputs: Outputs = Outputs.TOKENS


@dataclasses.dataclass(frozen=True)
class ShapedStep:
    """`(params, pool, state, shape, packed batches) -> (pool, state, shape, out)`.

    A step of which some rows have their logits bent.
    """

    bucket: Bucket
    outputs: Outputs = Outputs.TOKENS


@dataclasses.dataclass(frozen=True)
class Prepare:
    """`(pool, state, packed preparation) -> (pool, state)`: what a step may need before it."""


@dataclasses.dataclass(frozen=True)
class ZeroShape:
    """`() -> shape`: what bends the logits, of rows that bend nothing."""


@dataclasses.dataclass(frozen=True)
class StartShape:
    """`(shape, packed start) -> shape`: enters what bends the logits of a row."""


@dataclasses.dataclass(frozen=True)
class ReadBlocks:
    """`(pool, block ids) -> blocks`: what leaves for host memory. Nothing is donated."""


@dataclasses.dataclass(frozen=True)
class WriteBlocks:
    """`(pool, block ids, blocks) -> pool`: what comes back from there."""


Program = (
    Zeros | PlainStep | ShapedStep | Prepare | ZeroShape | StartShape | ReadBlocks | WriteBlocks
)


def common_programs(config: EngineConfig, buckets: Buckets) -> list[Program]:
    """What serves whoever asks for nothing rare, the steps most likely to be wanted first."""
    programs: list[Program] = [*map(PlainStep, buckets.all), Prepare()]
    if config.num_swap_blocks:
        programs += [ReadBlocks(), WriteBlocks()]
    return programs
