"""How a kernel is cut: tile, split, warps and stages, by the table beside this file or by formula.

`python -m benchmarks.tune_gpu` fills the table. What has no entry is cut by a formula.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from pallas_kernels import tuned
from pallas_kernels.gpu.device import target_chip
from pallas_kernels.quantize import is_quantized, product_dtype
from pallas_kernels.tuned import entry_name

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


def choose_decode_config(q: Float[Array, "B N H"], pool: Real[Array, "P K S W"]) -> DecodeConfig:
    """The table's cut, or the formula's."""
    fields = tuned_fields("decode", q, pool)
    return default_decode_config(q, pool) if fields is None else DecodeConfig(**fields)


def default_decode_config(q: Float[Array, "B N H"], pool: Real[Array, "P K S W"]) -> DecodeConfig:
    """The formula's cut for these arrays."""
    return decode_config(q.shape[2], product_dtype(q, pool), is_widened=is_quantized(pool.dtype))


def tuned_fields(
    kernel: str, q: Float[Array, "T N H"], pool: Real[Array, "P K S W"]
) -> dict[str, int] | None:
    """The fields of the table's cut for the GPU compiled for, or None.

    Shapes alone decide, never the batch's size nor its lengths: what else is computed must not
    change a row's bits.
    """
    chip = target_chip()
    # Entries are timed on pools of 16 and 32 bits, whose queries are rounded to them.
    if chip is None or is_quantized(pool.dtype):
        return None
    _, N, H = q.shape
    _, K, S, _ = pool.shape
    name = entry_name(kernel, chip=chip, heads=(N, K, H), dtype=pool.dtype.name, block_size=S)
    entry = read_table().get(name)
    return None if entry is None else dict(entry["config"])


def read_table() -> Mapping[str, Mapping[str, Any]]:
    """Every entry: its cut, and where the choice came from."""
    return tuned.read_table("pallas_kernels.gpu")


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
