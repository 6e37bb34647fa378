"""How many blocks the pool gets when nobody says: never so many that the machine dies of it."""

import contextlib
import ctypes
import os
import pathlib

from jaxtyping import DTypeLike

from jpaged.devices import Device
from jpaged_models import ModelConfig
from pallas_kernels import Backend, row_bytes

MAX_CPU_POOL_BYTES = 2 * 2**30
CPU_SHARE = 4  # a quarter of what this process may use
ASSUMED_BYTES = 2 * 2**30  # where the system does not say: any machine that runs a model has them
_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # limit, usage, its details, and there the page cache that goes when asked
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # v2
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),  # v1
)


def block_bytes(model: ModelConfig, *, block_size: int, dtype: DTypeLike, backend: Backend) -> int:
    """Bytes of one block in all layers, where the backend's device keeps it."""
    row = row_bytes(model.head_size, dtype, backend)
    return model.num_layers * model.num_kv_heads * block_size * row


def pool_bytes(
    device: Device,
    *,
    memory_fraction: float,
    temporaries: int,
    least: int,
    wanted: int,
    to_come: int = 0,
) -> int:
    """Bytes for the pool on `device`, or ValueError where that is not even `least`.

    Args:
        device: where the pool will live; the weights of an accelerator are on it already.
        memory_fraction: the share of an accelerator's memory that may be in use in all.
        temporaries: bytes that the largest step needs beside weights and pool.
        least: bytes of the smallest pool.
        wanted: bytes of every row at its longest: more could never be used.
        to_come: bytes of the weights where they are still to be loaded.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _cpu_pool_bytes(least, wanted, to_come)
    free = int(memory_fraction * stats["bytes_limit"]) - stats["bytes_in_use"] - temporaries
    if free < least:
        raise ValueError(
            f"memory_fraction={memory_fraction} of {_amount(stats['bytes_limit'])} leaves "
            f"{_amount(max(free, 0))} for the pool, and two blocks take {_amount(least)}: "
            f"{_amount(stats['bytes_in_use'])} are in use and a step needs "
            f"{_amount(temporaries)}; raise memory_fraction, lower max_num_batched_tokens, or "
            "take a smaller model or dtype"
        )
    return min(wanted, free)


def check_room(device: Device, *, num_blocks: int, size: int) -> None:
    """Raises ValueError where so many blocks of `size` bytes cannot all be there.

    A CPU's allocator would grant them, and the process would be killed when it fills them.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        available = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        available = available_bytes()
    if available is not None and num_blocks * size > available:
        raise ValueError(
            f"num_blocks={num_blocks} blocks of {_amount(size)} take {_amount(num_blocks * size)}, "
            f"and {_amount(available)} are free; lower num_blocks, or leave it out"
        )


def swap_blocks(swap_space: float, *, size: int) -> int:
    """Blocks of `size` bytes in `swap_space` GiB of host memory, which must be free."""
    wanted, available = int(swap_space * 2**30), available_bytes()
    if swap_space and wanted < size:
        raise ValueError(
            f"swap_space={swap_space} GiB holds no block, which takes {_amount(size)}; raise it, "
            "or leave it out to compute preempted sequences again"
        )
    if available is not None and wanted > available:
        raise ValueError(
            f"swap_space={swap_space} GiB of host memory, and {_amount(available)} are free; "
            "lower swap_space, or leave it out to compute preempted sequences again"
        )
    return wanted // size


def available_bytes() -> int | None:
    """Memory that this process may still take: the machine's, or its cgroup's if that is less.

    None where the system does not say.
    """
    known = [b for b in (_machine_bytes(), *map(_cgroup_bytes, _CGROUP_FILES)) if b is not None]
    return max(min(known), 0) if known else None


def return_freed_memory() -> None:
    """Gives the system what was freed and the allocator keeps: a compiler leaves 300 MB so.

    The pool is too large to be made of it. Only the GNU library has a word for this.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_pool_bytes(least: int, wanted: int, to_come: int) -> int:
    available = available_bytes()
    available = ASSUMED_BYTES if available is None else max(0, available - to_come)
    granted = min(wanted, available // CPU_SHARE, MAX_CPU_POOL_BYTES)
    if granted < least:
        raise ValueError(
            f"this process may take {_amount(available)} more, a quarter of that is for the pool, "
            f"and two blocks take {_amount(least)}; set num_blocks to have more than that "
            "quarter, lower block_size, or give the process more memory"
        )
    return granted


def _machine_bytes() -> int | None:
    """On Linux what is free or would be if asked for; elsewhere all that is built in, if known."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux, or one that does not tell
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf at all
        return None


def _cgroup_bytes(files: tuple[str, str, str, str]) -> int | None:
    """What the cgroup's limit leaves; what it caches of files is not in the way of more."""
    limit_file, usage_file, details_file, cached = files
    limit = _read(_CGROUP / limit_file)
    if limit in ("", "max"):
        return None
    details = dict(line.split(" ", 1) for line in _read(_CGROUP / details_file).splitlines())
    usage = int(_read(_CGROUP / usage_file)) - int(details.get(cached, 0))
    return int(limit) - usage


def _read(path: pathlib.Path) -> str:
    """The file's text, empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _amount(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
