"""How many blocks the pool gets when nobody says: never so many that the machine dies of it."""

import pathlib

import jax.numpy as jnp
from jaxtyping import DTypeLike

from jpaged.devices import Device
from jpaged_models import ModelConfig

MAX_CPU_POOL_BYTES = 2 * 2**30
CPU_SHARE = 4  # a quarter of what this process may use
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")


def block_bytes(model: ModelConfig, *, block_size: int, dtype: DTypeLike) -> int:
    """Bytes of one block in all layers."""
    lanes = 2 * model.head_size * jnp.dtype(dtype).itemsize
    return model.num_layers * model.num_kv_heads * block_size * lanes


def pool_bytes(device: Device, *, memory_fraction: float, temporaries: int, wanted: int) -> int:
    """Bytes for the pool on `device`, at most the `wanted` ones that could ever be used.

    Args:
        device: where the pool will live, the weights on it already.
        memory_fraction: the share of an accelerator's memory that may be in use in all.
        temporaries: bytes that the largest step needs beside weights and pool.
        wanted: bytes of every row at its longest.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return min(wanted, available_bytes() // CPU_SHARE, MAX_CPU_POOL_BYTES)
    free = int(memory_fraction * stats["bytes_limit"]) - stats["bytes_in_use"] - temporaries
    if free <= 0:
        raise ValueError(
            f"memory_fraction={memory_fraction} of {stats['bytes_limit'] / 2**30:.1f} GiB leaves "
            f"nothing for the pool: {stats['bytes_in_use'] / 2**30:.1f} GiB are in use and a step "
            f"needs {temporaries / 2**30:.1f} GiB; raise memory_fraction, lower "
            "max_num_batched_tokens, or take a smaller model or dtype"
        )
    return min(wanted, free)


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its cgroup's if that is less."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # v1
    ):
        if (_CGROUP / limit).is_file():
            text = (_CGROUP / limit).read_text().strip()
            if text != "max":
                available = min(available, int(text) - int((_CGROUP / usage).read_text()))
    return max(available, 0)
