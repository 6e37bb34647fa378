"""How contexts are cut into tiles, and the tiles that were tuned, from the table beside this file.

`python -m benchmarks.tune_tpu` fills it. What has no entry is cut by a formula, `default_tile` of
each kernel.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Real

from pallas_kernels import tuned
from pallas_kernels.tpu.device import LANES, whole_lanes
from pallas_kernels.tuned import entry_name

USUAL_RING = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvTile:
    """How a context is cut: blocks of a tile, and tiles in the ring."""

    blocks: int
    ring: int = USUAL_RING

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"a KV tile must have at least 1 block, got {self.blocks}")
        if self.ring < 2:
            raise ValueError(f"a ring must have at least 2 tiles, got {self.ring}")

    def ring_bytes(self, pool: Real[Array, "P K S W"]) -> int:
        """Bytes of VMEM."""
        return self.ring * self.blocks * block_bytes(pool)


def block_bytes(pool: Real[Array, "P K S W"]) -> int:
    """Bytes of a block in VMEM; a quantised one is there once more in what it is multiplied in."""
    _, K, S, W = pool.shape
    return K * S * whole_lanes(W) * max(pool.dtype.itemsize, 2)


def usual_ring(pool: Real[Array, "P K S W"], most_bytes: int) -> int:
    """Tiles of the ring where a tile may have so many bytes: few where one block has more."""
    return USUAL_RING if block_bytes(pool) <= most_bytes else 2


def longest_tile(block_size: int, max_blocks: int) -> int:
    """Blocks of a tile that holds a whole context: a power of two, in whole registers."""
    return pl.next_power_of_2(max(max_blocks, LANES // block_size))


def tuned_tile(
    kernel: str, *, heads: tuple[int, int, int], pool: Real[Array, "P K S W"]
) -> dict[str, int] | None:
    """The fields of the table's tile for the chip compiled for, or None; cut them to the arrays.

    Shapes alone decide, never a batch's lengths: what else is computed must not change a row's
    bits.
    """
    chip = target_chip()
    if chip is None:
        return None
    name = entry_name(
        kernel, chip=chip, heads=heads, dtype=pool.dtype.name, block_size=pool.shape[2]
    )
    entry = read_table().get(name)
    return None if entry is None else dict(entry["tile"])


def target_chip() -> str | None:
    """The TPU that is compiled for, there or not; None where it is anything else, or unknown."""
    try:
        version = str(pltpu.get_tpu_info().chip_version)
    except ValueError:  # how it says that the device is no TPU that it knows
        return None
    return "tpu7x" if version == "7x" else version


def read_table() -> Mapping[str, Mapping[str, Any]]:
    """Every entry: its tile, and where the choice came from."""
    return tuned.read_table("pallas_kernels.tpu")
