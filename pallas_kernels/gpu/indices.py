"""Indices of a load or a store, as Triton and interpret mode both take them."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int32


def indices(*parts: ArrayLike) -> tuple[Int32[Array, "*dims"], ...]:
    """Each of them in the shape of all: a mix of scalars, rows and columns is not interpreted."""
    shape = jnp.broadcast_shapes(*(jnp.shape(part) for part in parts))
    return tuple(
        jnp.full(shape, part) if jnp.ndim(part) == 0 else jnp.broadcast_to(part, shape)
        for part in parts
    )
