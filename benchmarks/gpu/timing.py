"""How long one call takes on the device, the cost of launching it from Python left out.

A chain is one jitted function of many calls, each on the result of the call before, over arrays
that take turns so that no cache holds them. XLA makes such a chain of kernels one CUDA graph where
it can. Under JAX 0.11.2 Mosaic's calls stay outside of graphs: their figures have a launch each,
and at small shapes, which take less than that, they are not comparable with other kernels' (under
0.12 they are inside). Results do not say which it was, since the compiled HLO does not: graphs are
made later, of what XLA starts. The first argument is donated and becomes the result, so that the
addresses in the graph never change. Chains are enqueued one after the other without waiting, until
they fill `TARGET_S`; a repeat is that time over the number of calls.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

TARGET_S = 0.02  # of one repeat
REPEATS = 7
COMPILE_THREADS = 12
MOST_TURNS = 128  # the smallest shapes so have 64 MiB in turn, a little more than that cache
WORKING_SET = 512 * 2**20  # bytes that take turns: ten times the 50 MB of an H100's L2


@dataclasses.dataclass(frozen=True)
class Chain:
    """Calls of `attend(x, turn, *rest)`, where `turn` is one of several that take turns."""

    attend: Callable[..., Any]
    calls: int

    def lower(self, x: Any, turns: Sequence[Any], *rest: Any) -> jax.stages.Lowered:
        """The chain for arguments of these shapes, ready to be compiled."""
        attend = jax.jit(self.attend)

        def run(x: Any, turns: Sequence[Any], *rest: Any) -> Any:
            for call in range(self.calls):
                x = attend(x, turns[call % len(turns)], *rest)
            return x

        return jax.jit(run, donate_argnums=0).lower(x, turns, *rest)


def num_turns(num_bytes: int) -> int:
    """How many arrays of so many bytes take turns: enough to exceed every cache, or MOST_TURNS."""
    return min(MOST_TURNS, max(2, math.ceil(WORKING_SET / num_bytes)))


def compile_all(
    programs: Mapping[Any, Callable[[], jax.stages.Lowered]],
) -> dict[Any, jax.stages.Compiled | Exception]:
    """Every program lowered and compiled, several at once, or what that failed with."""

    def compile_one(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled | Exception:
        try:
            return lower().compile()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other programs still count
            return error

    with ThreadPoolExecutor(COMPILE_THREADS) as threads:
        return dict(zip(programs, threads.map(compile_one, programs.values()), strict=True))


def time_chain(
    compiled: jax.stages.Compiled, calls: int, x: Any, *rest: Any
) -> tuple[dict[str, float], Any]:
    """Microseconds of a call, and the chain's last result; `x` is donated."""
    x = jax.block_until_ready(compiled(x, *rest))
    start = time.perf_counter()
    x = jax.block_until_ready(compiled(x, *rest))
    once = time.perf_counter() - start
    chains = max(1, min(64, round(TARGET_S / once)))
    repeats = REPEATS if once < 5 * TARGET_S else 3
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(chains):
            x = compiled(x, *rest)
        jax.block_until_ready(x)
        samples.append((time.perf_counter() - start) / (chains * calls) * 1e6)
    return spread(samples), x


def spread(samples_us: Sequence[float]) -> dict[str, float]:
    """The median of some microseconds, their least and their most."""
    return {
        "us": round(statistics.median(samples_us), 2),
        "min_us": round(min(samples_us), 2),
        "max_us": round(max(samples_us), 2),
        "repeats": len(samples_us),
    }


def time_runs(run: Callable[..., Any], *arguments: Any) -> list[float]:
    """Microseconds of one run, each sample the mean of runs enqueued without waiting."""
    jax.block_until_ready(run(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    count = max(1, min(64, round(TARGET_S / (time.perf_counter() - start))))
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = [run(*arguments) for _ in range(count)][-1]
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / count * 1e6)
    return samples
