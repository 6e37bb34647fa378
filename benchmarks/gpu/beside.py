"""Which backend is checked besides the one that was asked for, and what a backend takes.

On Hopper `pallas-gpu` brings `mosaic-gpu` with it, at whatever that takes. Parts that time it do so
after all else of theirs is recorded. Whether it is right is a part of its own, `mosaic`, which runs
alone: parts that share the device share what a kernel does to it.
"""

import jax
from jax.typing import DTypeLike

from benchmarks.gpu.settings import Record, Settings
from pallas_kernels import Backend, check_pool_of, choose_backend

BESIDE = {Backend.PALLAS_GPU.value: Backend.MOSAIC_GPU.value}


def second_backend(settings: Settings, record: Record) -> Backend | None:
    """The other one under test, or None; where this machine has not what it needs, a line says so.

    That line is no failure. The backend is ours as the first is: where it fails, the check fails.
    """
    name = BESIDE.get(settings.backend)
    if name is None:
        return None
    try:
        return choose_backend(name, jax.devices()[0].platform)
    except ValueError as reason:
        record(name, {"ok": True, "error": str(reason)})
        return None


def refusal(
    backend: Backend,
    *,
    block_size: int,
    dtype: DTypeLike,
    head_size: int,
    queries_per_head: int = 1,
) -> str | None:
    """Why the backend takes no such pool, or no so many queries a KV head, or None."""
    try:
        check_pool_of(
            backend,
            block_size=block_size,
            dtype=dtype,
            head_size=head_size,
            queries_per_head=queries_per_head,
        )
    except ValueError as reason:
        return str(reason)
    return None
