"""What the Mosaic GPU kernels take; nothing here needs a JAX that has them."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from pallas_kernels.gpu.device import as_number, target_capability, target_kind

HOPPER = 9.0  # the compute capability whose instructions they are made of
MIN_JAX = (0, 11, 2)
MIN_JAX_INTERPRETED = (0, 12)
DTYPES = ("bfloat16", "float16")  # what both the matrix instruction and the operands' layout take
HEAD_SIZES = (64, 128)  # 256 spills registers; others are no whole number of swizzles
SMALLEST_TILE, LARGEST_TILE = 64, 128  # tokens, of keys and values
SWIZZLE_ROWS = 8  # copies start at multiples of them


def missing_jax(*, interpreted: bool) -> str | None:
    """Why this JAX cannot run them, or None."""
    needed = MIN_JAX_INTERPRETED if interpreted else MIN_JAX
    if jax.__version_info__ >= needed:
        return None
    return f"they need JAX {'.'.join(map(str, needed))}, this is {jax.__version__}"


def check_pool(*, block_size: int, dtype: DTypeLike, head_size: int) -> None:
    """Raises ValueError for a pool that they do not take."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"mosaic-gpu takes pools of {DTYPES}, got {name}; use pallas-gpu")
    if head_size not in HEAD_SIZES:
        raise ValueError(
            f"mosaic-gpu takes head sizes {HEAD_SIZES}, got {head_size}; use pallas-gpu"
        )
    divides = block_size % SWIZZLE_ROWS == 0 and SMALLEST_TILE % block_size == 0
    if not divides and block_size % LARGEST_TILE:
        raise ValueError(
            f"mosaic-gpu takes blocks of 8, 16, 32, 64 or a multiple of {LARGEST_TILE} slots, "
            f"got {block_size}; use pallas-gpu"
        )


def check_group(queries_per_head: int) -> None:
    """Raises ValueError for more queries a KV head than they take."""
    if queries_per_head > SMALLEST_TILE:
        raise ValueError(
            f"mosaic-gpu takes at most {SMALLEST_TILE} queries a KV head, got {queries_per_head}; "
            "use pallas-gpu"
        )


def check_target(*, interpreted: bool) -> None:
    """Raises ValueError for a JAX, or a GPU that is compiled for, that they are not made for."""
    if reason := missing_jax(interpreted=interpreted):
        raise ValueError(f"mosaic-gpu cannot run: {reason}; use pallas-gpu")
    if interpreted:
        return
    capability = target_capability()
    if as_number(capability) != HOPPER:
        raise ValueError(
            f"mosaic-gpu needs compute capability {HOPPER} (Hopper), {target_kind()} has "
            f"{capability or 'none'}; use pallas-gpu"
        )


def check_arrays(
    q: Float[Array, "T N H"], pool: Real[Array, "P K S W"], *, interpreted: bool
) -> None:
    """Raises ValueError for arrays that they do not take, and where they cannot run at all."""
    check_target(interpreted=interpreted)
    check_pool(block_size=pool.shape[2], dtype=pool.dtype, head_size=q.shape[2])
    if q.dtype != pool.dtype:
        raise ValueError(
            f"mosaic-gpu takes a q of the pool's dtype, {pool.dtype}, got {q.dtype}; use pallas-gpu"
        )
    check_group(q.shape[1] // pool.shape[1])
