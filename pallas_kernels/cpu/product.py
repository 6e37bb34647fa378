"""Products in bfloat16 on a CPU: `row_product.cc` and `matrix_product.cc` as JAX functions."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, DTypeLike, Float

from pallas_kernels.cpu import build
from pallas_kernels.cpu.build import BuildError, library, processor

logger = logging.getLogger(__name__)
_INSTRUCTIONS = "avx512_bf16"  # of matrix_product.cc


def register(num_rows: int) -> str:
    """The name by which XLA knows the product of so many rows. Raises BuildError."""
    if num_rows > 1 and _INSTRUCTIONS not in processor().split():
        raise BuildError(f"this processor has no {_INSTRUCTIONS}")
    found = _registered("row_product" if num_rows == 1 else "matrix_product")
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _registered(name: str) -> str | BuildError:
    """Its target, or why there is none, which is said once and not asked again at each trace."""
    target = f"jpaged_{name}"
    try:
        compiled = library(f"{name}.cc")
    except BuildError as error:
        logger.warning("bfloat16 products by xla, %s.cc is missing: %s", name, error)
        return error
    build.register(compiled, target)
    return target


def matrix_product(
    x: BFloat16[Array, "T D"],
    matrix: BFloat16[Array, "..."],
    *,
    is_transposed: bool,
    dtype: DTypeLike,
) -> Float[Array, "T ..."]:
    """Rows times a matrix [D, ...], or [V, D] where `is_transposed`.

    Sums are float32 and stored as `dtype`, float32 or bfloat16. Raises BuildError where the kernel
    is not there.
    """
    T = len(x)
    own = matrix.shape[:1] if is_transposed else matrix.shape[1:]
    flat = matrix if is_transposed else matrix.reshape(matrix.shape[0], -1)
    out = jax.ShapeDtypeStruct(
        (T, flat.shape[0 if is_transposed else 1]),
        jnp.float32 if T == 1 else dtype,  # one row's sums are its threads', added last
    )
    multiply = jax.ffi.ffi_call(register(T), out, vmap_method="sequential")
    product = multiply(x, flat, is_transposed=np.bool_(is_transposed))
    return product.astype(dtype).reshape(T, *own)
