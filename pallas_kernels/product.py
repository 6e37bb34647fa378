"""The product of a single row of 16 bits, which no library here has for a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.cpu import product as cpu
from pallas_kernels.cpu.build import BuildError


def row_product(
    x: Float[Array, "1 D"], matrix: Float[Array, "..."], *, is_transposed: bool = False
) -> Float32[Array, "1 ..."]:
    """A row times a matrix [D, ...], or [V, D] where `is_transposed`; summed in float32.

    On a CPU XLA would convert the whole matrix to float32 (JAX 0.10 to 0.12). There a bfloat16 row
    goes to `row_product.cc`, and where that is missing, or in float16, a row of zeros goes with it.
    """
    by_library = functools.partial(_with_zeros, is_transposed=is_transposed)
    if x.dtype != jnp.bfloat16 or not _is_compiled():
        return by_library(x, matrix)
    ours = functools.partial(cpu.row_product, is_transposed=is_transposed)
    return jax.lax.platform_dependent(x, matrix, cpu=ours, default=by_library)


def _with_zeros(
    x: Float[Array, "1 D"], matrix: Float[Array, "..."], *, is_transposed: bool
) -> Float32[Array, "1 ..."]:
    rows = jnp.concatenate([x, jnp.zeros_like(x)])
    axis = 1 if is_transposed else 0
    contracted = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(rows, matrix, contracted, preferred_element_type=jnp.float32)[:1]


def _is_compiled() -> bool:
    """Whether the kernel is there; on a machine that computes elsewhere it is not even compiled."""
    if jax.devices()[0].platform != "cpu":
        return False
    try:
        cpu.register()
    except BuildError:
        return False
    return True
