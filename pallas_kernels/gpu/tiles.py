"""How a kernel is cut: tile, split, warps and stages, by formula."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

MIN_TILE_TOKENS = 16  # a matrix instruction's depth
TILE_BYTES = 32 << 10  # keys and values of a tile; with three stages two such are in flight
MAX_TILE_TOKENS = 128
NARROW_HEAD = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the decode kernel is cut. A row's bits follow `tile_tokens` and `split_tokens` alone.

    A program computes on `tile_tokens` at a time, the loads of the next `num_stages - 1` tiles
    being under way. A row's context is cut into splits of `split_tokens`. Rows x KV heads x splits
    are shared out to `num_programs` programs or some more, never fewer than one a row and KV head.
    """

    tile_tokens: int
    split_tokens: int
    num_warps: int = 4
    num_stages: int = 3
    num_programs: int = 4096  # 31 for each processor of an H100: full rows come in many waves

    def __post_init__(self):
        tile = self.tile_tokens
        if tile < MIN_TILE_TOKENS or tile & (tile - 1):
            raise ValueError(
                f"tile_tokens must be a power of two from {MIN_TILE_TOKENS} on, got {tile}"
            )
        if self.split_tokens < tile or self.split_tokens % tile:
            raise ValueError(
                f"split_tokens must be a multiple of tile_tokens={tile}, got {self.split_tokens}"
            )
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1 or self.num_programs < 1:
            raise ValueError(
                "num_stages and num_programs must be at least 1, "
                f"got {self.num_stages} and {self.num_programs}"
            )


def decode_config(head_size: int, dtype: DTypeLike, *, is_widened: bool = False) -> DecodeConfig:
    """A sound cut for products of this head size and dtype, whatever the batch.

    With `is_widened` the pool has eight bits, and its tiles pass through registers.

    Measured on an H100 (benchmarks/results): longer splits read long contexts of many rows faster,
    by 1 to 4 %, shorter ones spread one short context over more processors, in two thirds of the
    time. Heads of 64 gain more by the second.
    """
    token_bytes = 2 * padded_size(head_size) * jnp.dtype(dtype).itemsize
    tile = min(max(TILE_BYTES // token_bytes, MIN_TILE_TOKENS), MAX_TILE_TOKENS)
    # Four warps spill where lanes are masked, and where float32 leaves the matrix unit idle.
    has_matrix_unit = jnp.dtype(dtype).itemsize == 2
    plain = padded_size(head_size) == head_size and has_matrix_unit
    is_narrow = padded_size(head_size) <= NARROW_HEAD
    if is_widened:
        plain = False
        tile = tile if has_matrix_unit or is_narrow else MIN_TILE_TOKENS
    return DecodeConfig(
        tile_tokens=tile,
        split_tokens=256 if is_narrow else 512,
        num_warps=4 if plain else 8,
        num_stages=2 if is_narrow and plain else 3,
    )


def padded_size(size: int) -> int:
    """The next power of two, from 16 on: Triton knows no other, its matrix product none below."""
    return max(16, 1 << (size - 1).bit_length())
