"""What all kernels here share: dtypes, the base of their exponentials, indices of a load."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LOG2_E = math.log2(math.e)  # the processor's exponential is that of base 2


def check_dtypes(q: Float[Array, "T N H"], pool: Float[Array, "P K S W"]) -> None:
    """What these kernels ask beyond what `dispatch` asked for every backend."""
    for name, array in (("q", q), ("the pool", pool)):
        if array.dtype not in DTYPES:  # eight bits would wrap in Triton's offsets from 2 GiB on
            raise ValueError(
                f"{name} must be bfloat16, float16 or float32, got {array.dtype}; or use `xla`"
            )


def indices(*parts: ArrayLike) -> tuple[Int32[Array, "*dims"], ...]:
    """Each of them in the shape of all: a mix of scalars, rows and columns is not interpreted."""
    shape = jnp.broadcast_shapes(*(jnp.shape(part) for part in parts))
    return tuple(
        jnp.full(shape, part) if jnp.ndim(part) == 0 else jnp.broadcast_to(part, shape)
        for part in parts
    )
