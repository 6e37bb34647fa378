"""Which cuts of a GPU kernel are tried, which of those that compile are timed, which one is taken.

What is timed is chosen by an estimate: a processor must have enough bytes of keys and values on
their way to it (programs that it runs at a time x tiles that each has under way x bytes of a tile);
among cuts that have, those nearest the formula's come first.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from benchmarks.gpu.chips import GPUS
from benchmarks.tables import Shape
from pallas_kernels.gpu.tiles import padded_size

KERNELS = ("decode", "prefill")
TILE_TOKENS = (16, 32, 64, 128)
DECODE_WARPS = (2, 4, 8)  # one loses by 20 to 40 % at few rows
SPLIT_TOKENS = (128, 256, 512)  # 1024 wins up to 3 % at many rows and loses 40 % at one
QUERY_ROWS = (64, 128, 256)
CONTEXT_TOKENS = (32, 64, 128)
PREFILL_WARPS = (4, 8)
STAGES = (2, 3, 4)  # a fifth loses, and one leaves nothing under way
KEPT = 8
ENOUGH_BYTES = 64 << 10  # what a processor of an H100 reads in 2.5 us, at 3.35 TB/s for all 132
MARGIN = 1.03  # what two measurements of one cut may differ by

Cut = dict[str, int]  # fields of the kernel's configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A cut that compiled without a spilled register, and what the compiler made of it."""

    cut: Cut
    registers: int
    shared_bytes: int
    resident: int  # programs that a processor runs at a time


def list_cuts(shape: Shape, formula: Cut) -> list[Cut]:
    """The formula's, and all that compile to code of their own, its other fields as they are.

    Splits and numbers of programs are numbers in the same code.
    """
    if shape.kernel == "decode":
        fields = ("tile_tokens", "num_warps", "num_stages")
        values = itertools.product(TILE_TOKENS, DECODE_WARPS, STAGES)
    else:
        fields = ("query_rows", "context_tokens", "num_warps", "num_stages")
        values = itertools.product(QUERY_ROWS, CONTEXT_TOKENS, PREFILL_WARPS, STAGES)
    N, K, _ = shape.heads
    cuts = [formula | dict(zip(fields, each, strict=True)) for each in values]
    roomy = [cut for cut in cuts if cut.get("query_rows", N) >= N // K]
    return [formula, *(cut for cut in roomy if cut != formula)]


def rank(shape: Shape, formula: Cut, tried: Sequence[Tried]) -> list[Tried]:
    """All cuts but the formula's, a decode's in every split, those most worth timing first."""
    cuts = [each for one in tried for each in _in_every_split(one)]
    others = [one for one in cuts if one.cut != formula]

    def worth(one: Tried) -> tuple[int, float]:
        return -min(bytes_in_flight(shape, one), ENOUGH_BYTES), distance(one.cut, formula)

    return sorted(others, key=worth)


def _in_every_split(tried: Tried) -> list[Tried]:
    if "split_tokens" not in tried.cut:
        return [tried]
    splits = [split for split in SPLIT_TOKENS if split % tried.cut["tile_tokens"] == 0]
    return [dataclasses.replace(tried, cut=tried.cut | {"split_tokens": each}) for each in splits]


def fits(shape: Shape, *, spilled_bytes: int, shared_bytes: int) -> bool:
    """Whether a program so compiled keeps its registers and has no more memory than there is."""
    return spilled_bytes == 0 and shared_bytes <= GPUS[shape.chip].most_shared_bytes


def bytes_in_flight(shape: Shape, tried: Tried) -> int:
    """Keys and values on their way to one processor."""
    tokens = tried.cut["tile_tokens" if shape.kernel == "decode" else "context_tokens"]
    token_bytes = 2 * padded_size(shape.heads[2]) * jnp.dtype(shape.dtype).itemsize
    return tried.resident * (tried.cut["num_stages"] - 1) * tokens * token_bytes


def distance(cut: Cut, other: Cut) -> float:
    """How many times sizes are doubled or halved on the way, and stages added or taken away."""
    steps = abs(cut["num_stages"] - other["num_stages"])
    sizes = [field for field in cut if field != "num_stages"]
    return steps + sum(abs(math.log2(cut[field] / other[field])) for field in sizes)


def choose(times: Mapping[str, Mapping[str, float]], formula: str) -> str:
    """The fastest in the geometric mean over all shapes, or `formula` where none is well faster.

    `times` are microseconds by cut and shape. What takes the formula's place is faster than it by
    MARGIN, and at no shape slower by so much: one served shape does not pay for another.
    """
    if formula not in times:
        raise ValueError(f"the formula's own cut failed or computed something else: {formula}")
    ours = times[formula]

    def is_better(cut: str) -> bool:
        theirs = times[cut]
        return (
            theirs.keys() == ours.keys()
            and mean(theirs) * MARGIN <= mean(ours)
            and all(theirs[name] < ours[name] * MARGIN for name in ours)
        )

    better = [cut for cut in times if cut != formula and is_better(cut)]
    return min(better, key=lambda cut: mean(times[cut]), default=formula)


def mean(times: Mapping[str, float]) -> float:
    """The geometric mean, in which every shape has the same weight."""
    return math.exp(sum(map(math.log, times.values())) / len(times))
