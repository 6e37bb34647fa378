"""Which tiles are tried for a kernel, and which of them is taken."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from benchmarks.tables import Shape
from pallas_kernels.tpu.decode import MAX_TILE_BYTES
from pallas_kernels.tpu.device import whole_lanes
from pallas_kernels.tpu.tiles import USUAL_RING

KERNELS = ("decode", "prefill")
DECODE_TOKENS = (256, 512, 1024, 2048, 4096)  # of a tile of keys and values
PREFILL_TOKENS = (256, 512)
QUERIES = (32, 64, 128)  # tokens of a query tile
RINGS = (3, 4)  # of a decode tile; a prompt's is the usual one
EQUAL = 1.01  # times that are no further apart are the same
CLOSE = 1.03  # a win of less is not worth spills
FEW_SPILLS = 64

Tile = dict[str, int]  # fields of the kernel's tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A tile that compiled, and its figures."""

    tile: Tile
    time: float  # cycles or microseconds, of the same work whatever the tile
    spills: int = 0  # registers stored for want of room, and loaded again
    fills: int = 0


def search(
    shape: Shape, measure: Callable[[Tile], Tried | None], fits: Callable[[Tile], bool]
) -> Tried | None:
    """The best tile whose whole kernel fits, or None where no tile does.

    `measure` gives None for a tile that does not compile.
    """
    tried = [found for found in map(measure, _candidates(shape)) if found]
    while tried:
        best = choose(shape, tried)
        if fits(best.tile):
            return best
        tried.remove(best)
    return None


def choose(shape: Shape, tried: Sequence[Tried]) -> Tried:
    """The fastest; among equals the smallest, since a short context pays for a whole tile.

    Of equal rings the usual one: the estimator lets each copy have the whole bandwidth, so to it
    a short ring seems better than it is.
    """

    def spilled(found: Tried) -> int:
        return found.spills + found.fills

    fastest = min(found.time for found in tried)
    close = [found for found in tried if found.time <= fastest * CLOSE]
    # Less than CLOSE faster but with more than twice the spills loses.
    most = 2 * min(map(spilled, close)) + FEW_SPILLS
    calm = [found for found in close if spilled(found) <= most]
    fastest = min(found.time for found in calm)
    equal = [found for found in calm if found.time <= fastest * EQUAL]
    return min(
        equal,
        key=lambda found: (
            tile_bytes(shape, found.tile),
            abs(found.tile["ring"] - USUAL_RING),
            found.time,
        ),
    )


def tile_bytes(shape: Shape, tile: Tile) -> int:
    """Of a KV tile, and of the query tile if there is one."""
    N, K, _ = shape.heads
    query_bytes = tile.get("tokens", 0) * N * _token_bytes(shape) // (2 * K)
    return tile["blocks"] * shape.block_size * _token_bytes(shape) + query_bytes


def _token_bytes(shape: Shape) -> int:
    """What a token of a KV tile takes in VMEM, in what it is multiplied in."""
    _, K, H = shape.heads
    return K * whole_lanes(2 * H) * max(jnp.dtype(shape.dtype).itemsize, 2)


def _candidates(shape: Shape) -> list[Tile]:
    """All pairs of sizes: the best of one hangs on the other."""
    if shape.kernel == "decode":
        sizes = [C for C in DECODE_TOKENS if C * _token_bytes(shape) <= MAX_TILE_BYTES]
        blocks = sorted({max(1, C // shape.block_size) for C in sizes or DECODE_TOKENS[:1]})
        return [{"blocks": count, "ring": ring} for count in blocks for ring in RINGS]
    blocks = sorted({max(1, C // shape.block_size) for C in PREFILL_TOKENS})
    return [
        {"tokens": tokens, "blocks": count, "ring": USUAL_RING}
        for tokens, count in itertools.product(QUERIES, blocks)
    ]
