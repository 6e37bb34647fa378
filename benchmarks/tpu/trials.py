"""A tile on trial: the compiler's estimate of it, or its time where a TPU is at hand."""

import statistics
import sys
from typing import Any

import jax

from benchmarks.aot import NotCompiledError
from benchmarks.gpu.timing import time_runs
from benchmarks.tables import Shape
from benchmarks.tpu import whole
from benchmarks.tpu.rows import Row, estimate_row
from benchmarks.tpu.topology import compile_for_tpu
from benchmarks.tpu.tuning import Tile, Tried

SHARE = 512  # tokens of a context that an estimate is of; in prefill for QUERIES queries
CONTEXT = 16384  # of an estimate: even half of it is several turns of the longest tile
TIMEOUT = 300  # seconds for one compilation


def estimate(shape: Shape, tile: Tile) -> Tried | None:
    """Cycles for a share of a context, the larger of the compiler's and of the bytes' at peak."""
    probe: dict[str, Any] = {"block_size": shape.block_size, "dtype": shape.dtype}
    probe |= {"tile_blocks": tile["blocks"], "ring": tile["ring"]}
    visits = 1
    if shape.kernel == "prefill":
        probe |= {"tile_tokens": tile["tokens"], "queries": whole.QUERIES}
        visits = whole.QUERIES // tile["tokens"]
    row = Row(
        probe=shape.kernel,
        target=f"benchmarks.tpu.probes:{shape.kernel}",
        chip=shape.chip,
        heads=shape.heads,
        context=CONTEXT,
        candidates=[probe],
    )
    found = estimate_row(row, timeout=TIMEOUT)
    if "reason" in found:
        return _skip(shape, tile, found["reason"])
    cycles = found["tile_cycles"] * visits * SHARE / (tile["blocks"] * shape.block_size)
    memory = found["memory_cycles"] * SHARE / CONTEXT
    tried = Tried(
        tile=tile,
        time=round(max(cycles, memory), 1),
        spills=found["spills"],
        fills=found["fills"],
    )
    figures = f"{cycles:.1f} cycles, bytes {memory:.1f}, spills {tried.spills} + {tried.fills}"
    print(f"{shape.name}: {tile}: {figures}", file=sys.stderr, flush=True)
    return tried


def compiles(shape: Shape, tile: Tile) -> bool:
    """Whether the whole kernel does, with every option; a prefill probe has some heads only."""
    options = {**_fields(shape), "tile": tile}
    target = f"{whole.__name__}:{whole.with_every_option.__name__}"
    try:
        compile_for_tpu(target, chip=shape.chip, options=options, timeout=TIMEOUT)
    except NotCompiledError as error:
        return bool(_skip(shape, tile, error.reason))
    return True


def time_here(shape: Shape, tile: Tile) -> Tried | None:
    """Microseconds of the jitted kernel on this machine's TPU: the median of several runs."""
    call, arguments = whole.plain(**_fields(shape), tile=tile)
    try:
        samples = time_runs(jax.jit(call), *whole.filled(arguments))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other tiles still count
        return _skip(shape, tile, str(error))
    print(f"{shape.name}: {tile}: {samples} us", file=sys.stderr, flush=True)
    return Tried(tile=tile, time=round(statistics.median(samples), 2))


def compiles_here(shape: Shape, tile: Tile) -> bool:
    """The same as `compiles`, by the compiler of this machine's TPU."""
    call, arguments = whole.with_every_option(**_fields(shape), tile=tile)
    try:
        jax.jit(call).lower(*arguments).compile()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other tiles still count
        return bool(_skip(shape, tile, str(error)))
    return True


def _fields(shape: Shape) -> dict[str, Any]:
    return {
        "kernel": shape.kernel,
        "heads": shape.heads,
        "dtype": shape.dtype,
        "block_size": shape.block_size,
    }


def _skip(shape: Shape, tile: Tile, reason: str) -> None:
    print(f"{shape.name}: {tile} is left out: {reason[:200]}", file=sys.stderr, flush=True)
