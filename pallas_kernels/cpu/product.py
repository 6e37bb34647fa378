"""The product of one bfloat16 row on a CPU: `row_product.cc` as a JAX function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.cpu.build import library

_TARGET = "jpaged_row_product"


@functools.cache
def register() -> None:
    """Makes the compiled kernel known to XLA. Raises BuildError where there is none."""
    handler = jax.ffi.pycapsule(library("row_product.cc").jpaged_row_product)
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")


def row_product(
    x: BFloat16[Array, "1 D"], matrix: BFloat16[Array, "..."], *, is_transposed: bool
) -> Float32[Array, "1 ..."]:
    """A row times a matrix [D, ...], or [V, D] where `is_transposed`; summed in float32."""
    register()
    own = matrix.shape[:1] if is_transposed else matrix.shape[1:]
    flat = matrix if is_transposed else matrix.reshape(matrix.shape[0], -1)
    size = flat.shape[0] if is_transposed else flat.shape[1]
    multiply = jax.ffi.ffi_call(
        _TARGET, jax.ShapeDtypeStruct((1, size), jnp.float32), vmap_method="sequential"
    )
    return multiply(x, flat, is_transposed=np.bool_(is_transposed)).reshape(1, *own)
