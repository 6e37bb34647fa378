"""What all kernels here share: layouts, products, copies of a tile of keys and values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.gpu.common import LOG2_E
from pallas_kernels.gpu.mosaic.limits import SWIZZLE_ROWS

plgpu: Any = mosaic_gpu  # whose types change from one JAX to the next

WARPGROUP_ROWS = 64  # of a warpgroup's matrix instruction
SWIZZLE_LANES = 64  # of 16 bits
MOST_COPIED_ROWS = 256  # of a copy by TMA
SWIZZLED = (
    plgpu.TilingTransform((SWIZZLE_ROWS, SWIZZLE_LANES)),
    plgpu.SwizzleTransform(128),
)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # of a vector with an element for each row of a matrix
# Rows are reduced within a warp, which needs no memory.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


def simulator(interpret: bool) -> Any:
    """What `plgpu.kernel` is to interpret by, or None: with threads, and a look-out for races."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None


def own_array(ids: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The same numbers, none of them negative, in an array that is no part of another.

    XLA passes a contiguous slice to a kernel where it lies. Mosaic refuses addresses that are no
    multiples of 256 bytes, and XLA then leaves the start of the kernel to the host.
    """
    return jnp.maximum(ids, 0)


def check_tile(tile_tokens: int, block_size: int) -> None:
    """Raises ValueError for a tile that copies of a block or of a part of one do not fill."""
    small, large = sorted((tile_tokens, block_size))
    if large % small:
        raise ValueError(
            f"a tile must be whole blocks or a whole part of one, got {tile_tokens} tokens a tile "
            f"and blocks of {block_size}; take another config"
        )
    if small > MOST_COPIED_ROWS:
        raise ValueError(
            f"a copy has at most {MOST_COPIED_ROWS} rows, got tiles of {tile_tokens} tokens and "
            f"blocks of {block_size}; take a config of smaller tiles"
        )


def pieces_of(tile_tokens: int, block_size: int) -> int:
    """Copies that fill a tile: one a block, or one where a block has more than a tile."""
    return max(1, tile_tokens // block_size)


def load_tile(
    pool_ref: Any,  # [P * K * S, W]
    tables_ref: Any,  # i32[B, M]
    tile_ref: Any,  # [tile_tokens, W], in shared memory
    *,
    row: Int32[Array, ""],
    head: Int32[Array, ""],
    tile: Int32[Array, ""],
    last_block: Int32[Array, ""],
    block_size: int,
    num_kv_heads: int,
    ids_at_once: int,
    wait_for_room: Callable[[], None],
    full: Any,
) -> None:
    """Starts the copies of a tile, each of which arrives at the barrier `full`.

    Ids are read before there is room, `ids_at_once` for registers' sake. Behind a context's last
    block it is that block again: the table may hold anything there.
    """
    C = tile_ref.shape[0]
    size, count = min(C, block_size), pieces_of(C, block_size)

    def first_row(piece: int) -> Int32[Array, ""]:
        position = tile * C + piece * size
        column = jnp.minimum(jax.lax.div(position, jnp.int32(block_size)), last_block)
        first = (tables_ref[row, column] * num_kv_heads + head) * block_size
        inside = jax.lax.rem(tile, jnp.int32(block_size // size)) if block_size > C else 0
        return first + inside * size

    for begin in range(0, count, ids_at_once):
        pieces = range(begin, min(begin + ids_at_once, count))
        rows = [first_row(piece) for piece in pieces]
        if begin == 0:
            wait_for_room()
        for piece, first in zip(pieces, rows, strict=True):
            piece_ref = tile_ref.at[pl.ds(piece * size, size)]
            plgpu.copy_gmem_to_smem(pool_ref.at[pl.ds(first, size)], piece_ref, full)


def clear_unseen(values_ref: Any, start: Int32[Array, ""], end: Int32[Array, ""]) -> None:
    """Zeroes the rows outside of [start, end): no query sees them, but zero times NaN is NaN."""
    size, H = values_ref.shape
    for first in range(0, size, WARPGROUP_ROWS):  # a piece at a time, for registers' sake
        piece_ref = values_ref.at[pl.ds(first, WARPGROUP_ROWS)]
        values = plgpu.load(piece_ref, layout=plgpu.Layout.WGMMA)
        rows = row_iota(WARPGROUP_ROWS) + first
        seen = by_rows((rows >= start) & (rows < end), H)
        piece_ref[...] = jnp.where(seen, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def soft_capped(
    products: Float[Array, "X C"], scale: float, soft_cap: float
) -> Float[Array, "X C"]:
    """soft_cap * tanh(products * scale / soft_cap) * log2(e), logits in base 2.

    tanh by way of exp2: approximate mathematics has a tanh of eleven bits.
    """
    doubled = jnp.exp2(products * (2 * LOG2_E * scale / soft_cap))
    return (soft_cap * LOG2_E) * (1 - 2 / (1 + doubled))


def row_iota(size: int) -> Int32[Array, " X"]:
    """Each row's index, an element for each row of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=ROWS)


def column_iota(shape: tuple[int, ...]) -> Int32[Array, "X Y"]:
    """Each column's index, in the layout of a matrix instruction's result."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def by_rows(rows: Shaped[Array, " X"], count: int) -> Shaped[Array, "X Y"]:
    """A vector's elements, each in all columns of its row."""
    return jax.lax.broadcast_in_dim(rows, (rows.shape[0], count), [0])


def full_rows(size: int, value: float) -> Float[Array, " X"]:
    """A vector of one value, an element for each row of a matrix."""
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), ROWS)


def zero_matrix(shape: tuple[int, int]) -> Float[Array, "X Y"]:
    """Zeros in the layout of a matrix instruction's result."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def product(
    a_ref: Any, b_ref: Any, *, meanwhile: Callable[[], None] | None = None
) -> Float[Array, "X Y"]:
    """A @ b.T in float32, both in shared memory; `meanwhile` is called once it is under way."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, transposed(b_ref))
        if meanwhile is not None:
            meanwhile()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def transposed(ref: Any) -> Any:
    """The same memory, its two axes exchanged."""
    # A function until JAX 0.11, a method from 0.12 on, where the function warns.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def accumulate(
    acc: Float[Array, "X Z"],
    a: Float[Array, "X Y"],
    b_ref: Any,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Float[Array, "X Z"]:
    """Acc + a @ b in float32, `a` in registers; `meanwhile` is called once it is under way."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)
        if meanwhile is not None:
            meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def accumulate_interpreted(
    acc: Float[Array, "X Z"],
    a: Float[Array, "X Y"],
    b_ref: Any,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> Float[Array, "X Z"]:
    """The same without the instruction, which is interpreted only with `a` in shared memory."""
    b = b_ref[...]
    plgpu.commit_smem()  # the next copy to this place comes after the read
    if meanwhile is not None:
        meanwhile()
    return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)


def named(kernel: Callable[..., None], **options: Any) -> Callable[..., None]:
    """The kernel with its options, under its own name in profiles."""

    def body(*refs, **scratch):
        kernel(*refs, **scratch, **options)

    body.__name__ = kernel.__name__.strip("_").removesuffix("_kernel")
    return body
