"""The cases of the part correctness: what is attended to, in what pool, and with which options."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu.oracle import Ragged, make_ragged
from benchmarks.gpu.settings import Settings

Heads = tuple[int, int, int]

HEADS: list[Heads] = [
    (32, 8, 128),
    (9, 3, 64),
    (14, 2, 64),
    (16, 1, 64),
    (8, 8, 96),
    (16, 2, 80),
    (8, 4, 256),
]
BLOCK_SIZES = (8, 32, 64, 128)  # and 16, of all other cases
OPTIONS: list[dict[str, Any]] = [
    {"window": 100},
    {"window": 700, "soft_cap": 5.0},
    {"soft_cap": 3.0},
    {"sinks": True},
    {"window": 100, "sinks": True},
]
EIGHT_BITS = ("int8", "float8_e4m3fn")
# Around blocks, tiles and splits of 256 and 512 tokens; the lone one is a row of its own length.
DECODE_LENS = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 777, 1025, 1601]
RAGGED_ROWS = [(1, 1), (1, 16), (1, 333), (1, 1200), (2, 2), (64, 64), (17, 530), (130, 130)]
RAGGED_ROWS += [(128, 700), (65, 1030), (5, 300)]
# So many that each of an H100's 132 programs has many splits of a KV head: 12 of 9/3/64, where a
# split has 256 tokens, and 22 of 32/8/128, where it has 512.
MANY_ROWS = [(1, 1 + 389 * row % 700) for row in range(300)]
LONG_ROWS = [(1, 1 << 17)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One case. Of the options, `sinks` says that there are some: which, follows from the seed."""

    job: str  # "decode" or "ragged"
    heads: Heads
    block_size: int = 16
    dtype: str = "bfloat16"
    pool_dtype: str | None = None  # where it is another: eight bits
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: str = "usual"  # or "many", "long", or "far": at the end of a large pool

    @property
    def name(self) -> str:
        """What it is called in the results."""
        heads = "/".join(map(str, self.heads))
        extras = "".join(f" {key}={value}" for key, value in self.options.items())
        extras += "" if self.pool_dtype is None else f" pool {self.pool_dtype}"
        extras += "" if self.rows == "usual" else f" {self.rows} rows"
        return f"{self.job} {heads} block {self.block_size} {self.dtype}{extras}"


def list_specs(scale: str) -> Iterator[Spec]:
    """All cases."""
    if scale == "toy":
        yield Spec(job="decode", heads=(6, 3, 16), options={"window": 20, "sinks": True})
        yield Spec(job="ragged", heads=(6, 3, 16), block_size=8, pool_dtype="int8")
        return
    common, odd = HEADS[:2], HEADS[-1]
    for job in ("decode", "ragged"):
        for heads in HEADS:
            yield Spec(job=job, heads=heads)
        for heads in common:
            for block_size in BLOCK_SIZES:
                yield Spec(job=job, heads=heads, block_size=block_size)
            for options in OPTIONS:
                yield Spec(job=job, heads=heads, options=options)
        for heads in (*common, odd):
            for dtype in ("float16", "float32"):
                yield Spec(job=job, heads=heads, dtype=dtype)
            for pool_dtype in EIGHT_BITS:
                yield Spec(job=job, heads=heads, pool_dtype=pool_dtype)
        yield Spec(job=job, heads=common[1], pool_dtype="int8", options=OPTIONS[-1])
    for heads in common:
        yield Spec(job="decode", heads=heads, rows="many")
    yield Spec(job="ragged", heads=common[1], rows="many")
    yield Spec(job="decode", heads=common[1], rows="long")


def make_case(spec: Spec, settings: Settings) -> Ragged:
    """The case's arrays, others for every seed."""
    usual = [(1, length) for length in DECODE_LENS] if spec.job == "decode" else RAGGED_ROWS
    rows = {
        "usual": usual,
        "many": MANY_ROWS if spec.job == "decode" else MANY_ROWS + RAGGED_ROWS,
        "long": LONG_ROWS,
        "far": usual,
    }[spec.rows]
    if settings.scale == "toy":
        rows = [(queries, context) for queries, context in rows if context <= 65]
    return make_ragged(
        rows,
        heads=spec.heads,
        block_size=spec.block_size,
        dtype=spec.dtype,
        pool_dtype=spec.pool_dtype,
        seed=_seed(spec, settings),
    )


def array_options(spec: Spec, case: Ragged, settings: Settings) -> dict[str, np.ndarray]:
    """The options that are arrays: sinks, some of them silent and some loud, and scales."""
    found = {}
    if "sinks" in spec.options:
        rng = np.random.default_rng(_seed(spec, settings))
        found["sinks"] = rng.normal(0, 4, spec.heads[0]).astype(np.float32)
    if case.kv_scales is not None:
        found["kv_scales"] = case.kv_scales
    return found


def plain_options(spec: Spec) -> dict[str, Any]:
    """The others, which a program is compiled for."""
    return {key: value for key, value in spec.options.items() if key != "sinks"}


def _seed(spec: Spec, settings: Settings) -> int:
    return settings.seed + sum(map(ord, spec.name))
