"""What changes the pool on the `cpu` backend: `pool.cc` as JAX functions.

Each is in place where the caller donated the pool.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, Real

from pallas_kernels.cpu import build
from pallas_kernels.cpu.build import library

_WRITE_KV, _COPY_BLOCKS, _WRITE_BLOCKS = (
    "jpaged_write_kv",
    "jpaged_copy_blocks",
    "jpaged_write_blocks",
)


@functools.cache
def register() -> None:
    """Makes the compiled kernels known to XLA. Raises BuildError where there are none."""
    compiled = library("pool.cc")
    for target in (_WRITE_KV, _COPY_BLOCKS, _WRITE_BLOCKS):
        build.register(compiled, target)


def write_kv(
    pool: Real[Array, "P K S W"],
    k: Real[Array, "T K H"],
    v: Real[Array, "T K H"],
    slots: Int32[Array, " T"],
) -> Real[Array, "P K S W"]:
    """The pool with each token's K and V, of its dtype, in its slot.

    Tokens of the null block are left out, as are those whose block the pool does not have.
    """
    return _changed(_WRITE_KV, pool, k, v, slots)


def copy_blocks(
    pools: tuple[Real[Array, "P K S W"], ...], copies: Int32[Array, "X 2"], count: Int32[Array, ""]
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool after the first `count` of the (source, destination) copies, in order."""
    return tuple(_changed(_COPY_BLOCKS, pool, copies, count) for pool in pools)


def write_blocks(
    pools: tuple[Real[Array, "P K S W"], ...],
    block_ids: Int32[Array, " X"],
    blocks: Real[Array, "X L K S W"],
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool with whole blocks put in; those for block id P are dropped."""
    return tuple(
        _changed(_WRITE_BLOCKS, pool, block_ids, blocks, layer=np.int64(layer))
        for layer, pool in enumerate(pools)
    )


def _changed(
    target: str, pool: Real[Array, "P K S W"], *arrays: Array, **attributes: Any
) -> Real[Array, "P K S W"]:
    register()
    change = jax.ffi.ffi_call(
        target,
        jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={0: 0},
        vmap_method="sequential",
    )
    return change(pool, *arrays, **attributes)
