"""New K and V into the pool on the `cpu` backend: `write_kv.cc` as a JAX function."""

import functools

import jax
from jaxtyping import Array, Int32, Real

from pallas_kernels.cpu.build import library

_TARGET = "jpaged_write_kv"


@functools.cache
def register() -> None:
    """Makes the compiled kernel known to XLA. Raises BuildError where there is none."""
    handler = jax.ffi.pycapsule(library("write_kv.cc").jpaged_write_kv)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")


def write_kv(
    pool: Real[Array, "P K S W"],
    k: Real[Array, "T K H"],
    v: Real[Array, "T K H"],
    slots: Int32[Array, " T"],
) -> Real[Array, "P K S W"]:
    """The pool with each token's K and V, of its dtype, in its slot; in place if it is donated.

    Tokens of the null block are left out, as are those whose block the pool does not have.
    """
    register()
    write = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={0: 0},
        vmap_method="sequential",
    )
    return write(pool, k, v, slots)
