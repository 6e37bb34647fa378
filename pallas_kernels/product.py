"""The product of rows and a weight matrix: XLA's, but in bfloat16 on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.cpu import product as cpu
from pallas_kernels.cpu.build import BuildError


def matrix_product(
    x: Float[Array, "T D"],
    matrix: Float[Array, "..."],
    *,
    is_transposed: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T ..."]:
    """Rows times a matrix [D, ...], or [V, D] where `is_transposed`; x and it are of one dtype.

    Sums are float32 and stored as `dtype`. On a CPU XLA packs a bfloat16 matrix anew in each call,
    and a row that is alone has it convert all of it to float32 (JAX 0.10 to 0.12). There
    `matrix_product.cc` and `row_product.cc` multiply; where one is missing, XLA does, and a row of
    zeros goes with one that is alone. Gradients are reverse-mode alone where they multiply.
    """
    by_xla = functools.partial(_by_xla, is_transposed=is_transposed, dtype=dtype)
    is_narrow = x.dtype == matrix.dtype == jnp.bfloat16
    if not is_narrow or not matrix.size or not _is_compiled(len(x)):
        return by_xla(x, matrix)
    ours = jax.custom_vjp(
        functools.partial(cpu.matrix_product, is_transposed=is_transposed, dtype=dtype)
    )
    ours.defvjp(
        lambda *operands: (ours(*operands), operands),
        lambda operands, cotangent: jax.vjp(by_xla, *operands)[1](cotangent),
    )
    return jax.lax.platform_dependent(x, matrix, cpu=ours, default=by_xla)


def _by_xla(
    x: Float[Array, "T D"], matrix: Float[Array, "..."], *, is_transposed: bool, dtype: DTypeLike
) -> Float[Array, "T ..."]:
    T = len(x)
    rows = jnp.concatenate([x, jnp.zeros_like(x)]) if T == 1 and x.dtype != jnp.float32 else x
    contracted = (((1,), (1 if is_transposed else 0,)), ((), ()))
    sums = jax.lax.dot_general(rows, matrix, contracted, preferred_element_type=jnp.float32)
    return sums[:T].astype(dtype)


def _is_compiled(num_rows: int) -> bool:
    """Whether the kernel is there; on a machine that computes elsewhere it is not even compiled."""
    if jax.devices()[0].platform != "cpu":
        return False
    try:
        cpu.register(num_rows)
    except BuildError:
        return False
    return True
