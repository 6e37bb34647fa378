"""What all kernels here share: dtypes, the base of exponentials, indices of a load, sinks."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.gpu.device import as_number, target_capability
from pallas_kernels.quantize import LARGEST

DTYPES = ("bfloat16", "float16", "float32")
MAX_ELEMENTS = 2**31 - 1  # offsets into an array are int32, up to 4 GiB of it
MIN_FLOAT8_CAPABILITY = 8.9  # Triton converts from float8_e4m3fn on none below
LOG2_E = math.log2(math.e)  # the processor's exponential is that of base 2


def check_arrays(q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]) -> None:
    """What these kernels ask beyond what `dispatch` asked for every backend."""
    _check_dtype("q", q, DTYPES)
    check_pool(pool)
    check_capability(pool.dtype, as_number(target_capability()))


def check_pool(pool: Real[Array, "P K S W"]) -> None:
    """The same of a pool alone."""
    _check_dtype("the pool", pool, (*DTYPES, *LARGEST))
    if pool.dtype.itemsize == 1 and pool.size > MAX_ELEMENTS:
        raise ValueError(
            f"a pool of eight bits must have at most {MAX_ELEMENTS} elements, got {pool.size}: "
            "offsets are int32; make it of fewer blocks, or use `xla`"
        )


def check_capability(dtype: DTypeLike, capability: float | None) -> None:
    """Raises ValueError where a GPU of this capability, if it is known, reads no such pool."""
    if jnp.dtype(dtype) != jnp.float8_e4m3fn or capability is None:
        return
    if capability < MIN_FLOAT8_CAPABILITY:
        raise ValueError(
            f"a pool of float8_e4m3fn needs compute capability {MIN_FLOAT8_CAPABILITY}, this "
            f"GPU has {capability}; take int8, or use `xla`"
        )


def _check_dtype(name: str, array: Real[Array, "..."], names: tuple[str, ...]) -> None:
    if array.dtype.name not in names:
        raise ValueError(f"{name} must be one of {names}, got {array.dtype}; or use `xla`")


def head_scales(
    scale: float, refs: Sequence[Any], head: Int32[Array, ""]
) -> tuple[float | Float[Array, ""], float | Float[Array, ""]]:
    """What logits and values of a KV head are multiplied by; `refs` has a pool's scales, if any."""
    if not refs:
        return scale, 1.0
    return scale * refs[0][0, head], refs[0][1, head]


def nothing(dtype: DTypeLike) -> int | float:
    """What a masked load gives in place of what it leaves out: Triton has no 0 of eight bits."""
    return 0.0 if jnp.issubdtype(dtype, jnp.floating) else 0


def indices(*parts: ArrayLike) -> tuple[Int32[Array, "*dims"], ...]:
    """Each of them in the shape of all: a mix of scalars, rows and columns is not interpreted."""
    shape = jnp.broadcast_shapes(*(jnp.shape(part) for part in parts))
    return tuple(
        jnp.full(shape, part) if jnp.ndim(part) == 0 else jnp.broadcast_to(part, shape)
        for part in parts
    )


def absorb_sinks(
    sinks: Float[Array, "*dims"], high: Float[Array, "*dims"], total: Float[Array, "*dims"]
) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
    """The sum of weights with the sinks' own, and what values shrink by.

    `high` is in base 2, sinks are logits as the model has them.
    """
    sinks = sinks.astype(jnp.float32) * LOG2_E
    new_high = jnp.maximum(high, sinks)
    shrink = jnp.exp2(high - new_high)
    return total * shrink + jnp.exp2(sinks - new_high), shrink
