"""What this device can do: bytes read a second, bytes copied a second, a large matrix product."""

import jax
import jax.numpy as jnp

from benchmarks.gpu.inputs import random_array, random_key
from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.timing import spread, time_runs

SIZES = {"full": (2**30, 8192), "toy": (2**16, 64)}  # elements of the array, side of the matrices


def run(settings: Settings, record: Record) -> None:
    """Records the best of several ways to read, a copy, and a product in bfloat16."""
    num_elements, side = SIZES[settings.scale]
    x = random_array(random_key(settings.seed), (num_elements // 1024, 1024), jnp.bfloat16)
    ways = {
        "read sum": lambda x: jnp.sum(x, dtype=jnp.float32),
        "read row sums": lambda x: jnp.sum(x, axis=1, dtype=jnp.float32),
        "read max": jnp.max,
    }
    for name, way in ways.items():
        record.begin(name)
        timing = spread(time_runs(jax.jit(way), x))
        record(name, {"ok": True, **timing, "gbps": _gbps(x.nbytes, timing["us"])})
    timing = spread(time_runs(jax.jit(lambda x: x + 1), x))
    record("copy", {"ok": True, **timing, "gbps": _gbps(2 * x.nbytes, timing["us"])})
    del x
    a, b = (random_array(random_key(seed), (side, side), jnp.bfloat16) for seed in (1, 2))
    timing = spread(time_runs(jax.jit(jnp.matmul), a, b))
    record("matmul", {"ok": True, **timing, "tflops": round(2 * side**3 / timing["us"] / 1e6, 1)})


def _gbps(num_bytes: int, us: float) -> float:
    return round(num_bytes / us / 1e3, 1)
