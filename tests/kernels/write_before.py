"""A step's use of one layer's pool, for what compiles without the device."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import Backend, write_kv


def write_before(
    attend: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """New K and V are written into the donated pool, then `attend` reads it."""
    q, pool, block_tables, seq_lens = arguments
    B, K, H = q.shape[0], pool.shape[1], q.shape[2]

    def step(pool, q, k, v, slots, block_tables, seq_lens):
        pool = write_kv(pool, k, v, slots, backend=Backend.XLA)
        return pool, attend(q, pool, block_tables, seq_lens)

    new = jax.ShapeDtypeStruct((B, K, H), q.dtype)
    return jax.jit(step, donate_argnums=0), (pool, q, new, new, seq_lens, block_tables, seq_lens)
