"""Pools so large that offsets into them need all their bits: cases whose rows lie at their end.

A pool of 16 bits has more than 2^31 elements, hence more than 4 GiB; one of eight bits almost as
many as it may have. Where the device has not the memory, a line says so.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.beside import refusal
from benchmarks.gpu.oracle import NO_BLOCK, Ragged
from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.specs import Spec, make_case
from pallas_kernels import Backend

HEADS = (8, 2, 64)
MOST_ELEMENTS = 2**31 - 1  # of a pool of eight bits
ROOM = 2.5  # pools that must fit at a time: a change that was not in place has two


def cases(backend: Backend, settings: Settings, record: Record) -> Iterator[tuple[Spec, Ragged]]:
    """Each case that the backend takes, one at a time, since each has the memory for itself."""
    for job in ("decode", "ragged"):
        for pool_dtype in (None, "int8"):
            spec = Spec(job=job, heads=HEADS, pool_dtype=pool_dtype, rows="far")
            if not settings.lacks(spec.name):
                continue
            dtype = pool_dtype or spec.dtype
            pool = {"block_size": spec.block_size, "dtype": dtype, "head_size": HEADS[2]}
            if refusal(backend, queries_per_head=HEADS[0] // HEADS[1], **pool) is not None:
                continue
            case = make_case(spec, settings)
            num_blocks = blocks_of(case.pool.shape, dtype, settings.scale)
            if reason := lack_of_memory(case.pool.nbytes // len(case.pool) * num_blocks):
                record(spec.name, {"ok": True, "error": reason})
                continue
            yield spec, _moved(case, num_blocks)


def blocks_of(shape: tuple[int, ...], dtype: str, scale: str) -> int:
    """How many blocks of this shape a large pool has."""
    if scale == "toy":
        return shape[0] + 9
    elements = int(np.prod(shape[1:]))
    if jnp.dtype(dtype).itemsize == 1:
        return MOST_ELEMENTS // elements
    return 2**31 // elements + shape[0]  # all that is in use lies beyond


def lack_of_memory(num_bytes: int) -> str | None:
    """Why the device has no room for such a pool, or None."""
    stats = jax.devices()[0].memory_stats() or {}
    needed, limit = ROOM * num_bytes, stats.get("bytes_limit")
    if needed < 2**30 or (limit is not None and needed <= limit):
        return None
    there = "an unknown number" if limit is None else f"{limit / 2**30:.1f}"
    return f"left out: it needs {needed / 2**30:.1f} GiB of memory, there are {there}"


def fill(shape: tuple[int, ...], dtype: jnp.dtype, end: np.ndarray) -> jax.Array:
    """A pool that ends with these blocks; the others are the worst there is."""
    worst = 127 if dtype == jnp.int8 else jnp.nan
    first = shape[0] - len(end)

    def make(end: jax.Array) -> jax.Array:
        return jnp.full(shape, worst, dtype).at[first:].set(end)

    return jax.jit(make)(end)


def _moved(case: Ragged, num_blocks: int) -> Ragged:
    """The case with its pool's blocks behind many others."""
    distance = num_blocks - len(case.pool)
    tables = np.where(case.block_tables == NO_BLOCK, NO_BLOCK, case.block_tables + distance)
    pool = fill((num_blocks, *case.pool.shape[1:]), case.pool.dtype, case.pool)
    return dataclasses.replace(case, pool=pool, block_tables=tables.astype(np.int32))
