"""The ring of buffers that contexts stream through, block by block, ahead of the arithmetic.

A kernel's grid walks over contexts, one after the other. While a tile is computed on, those behind
it are in flight: of the same context and, where that ends, the first ones of the next.
pallas_kernels/README.md draws it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int32

Ref = Any  # what is in it, and where, stands beside it: JAX has no public name for its type
Scalar = Int32[Array, ""] | int
Absorb = Callable[[Scalar, Ref, Callable[[], None] | None], None]


class Walk(NamedTuple):
    """A context, and what is read of it: tokens `start` to `end`; nothing where they meet."""

    table: Ref  # i32[1, M] in SMEM
    start: Scalar
    end: Scalar


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers of one tile each, with a semaphore each: tile j of the whole grid is in j mod ring.

    Were two tiles to share a semaphore, a wait for the older one could be met by blocks of the
    younger. `turn` outlives a walk, so that the next one finds what was fetched for it.
    """

    pool: Ref  # [P, KV heads, S, W] in HBM
    buffers: Ref  # [ring, K, C, W] in VMEM
    arrived: Ref  # DMA semaphores [ring]
    turn: Ref  # i32[1] in SMEM: the buffer of this walk's first tile
    first_head: Scalar = 0  # of the pool's KV heads, K from here on are fetched

    def stream(
        self,
        walk: Walk,
        following: Walk,
        absorb: Absorb,
        *,
        is_first: Bool[Array, ""],
        plain_end: Scalar | None = None,
    ) -> None:
        """Calls `absorb(tile, its buffer [K, C, W], meanwhile)` for the walk's tiles in turn.

        Tiles are numbered from the context's start and cut at multiples of C. Of a buffer only
        the slots of blocks that hold a token of the walk are filled. Where `is_first` nothing is
        in flight yet; else the walk before was streamed with this one as its `following`.

        With `plain_end` the walk is from token 0 on, and every query sees all the tokens before
        `plain_end`. Most tiles before it are plain: `absorb` need not look who sees what, and calls
        `meanwhile`, which starts the copies of a tile ahead, once it has loaded what the first
        product needs. So the scalar unit has work while the matrix unit's answer is awaited; what
        is loaded of a buffer later in the program is not loaded sooner. For other tiles `meanwhile`
        is None.
        """
        ring = self.buffers.shape[0]
        first, count = self._tiles(walk)
        following_first, following_count = self._tiles(following)
        num_plain = 0 if plain_end is None else self._num_plain(walk, plain_end)

        @pl.when(is_first)
        def _start_at_the_first_buffer():
            self.turn[0] = 0

        base = self.turn[0]

        def fetch(place: Scalar, *, own: Bool[Array, ""] | bool) -> None:
            """Starts the tile at a place of this walk, or behind its end of the following one."""
            buffer = self._buffer(base + place)

            @pl.when((place < count) & own)
            def _fetch_own():
                self._start(walk, first + place, buffer)

            beyond = place - count

            @pl.when((beyond >= 0) & (beyond < following_count))
            def _fetch_following():
                self._start(following, following_first + beyond, buffer)

        def take_plain(place: Scalar, _: None) -> None:
            ahead = place + ring - 1

            def start_ahead() -> None:
                self._start_all(walk, first + ahead, self._buffer(base + ahead))

            buffer = self._buffer(base + place)
            self._wait(walk, first + place, buffer)
            absorb(first + place, self.buffers.at[buffer], start_ahead)

        def take(place: Scalar, _: None) -> None:
            fetch(place + ring - 1, own=True)
            buffer = self._buffer(base + place)
            self._wait(walk, first + place, buffer)
            absorb(first + place, self.buffers.at[buffer], None)

        # The walk before has started this one's first tiles, if there was one. Where this walk has
        # fewer, the rest are the following one's: to start those is this walk's part.
        jax.lax.fori_loop(0, ring - 1, lambda place, _: fetch(place, own=is_first), None)
        if plain_end is not None:
            jax.lax.fori_loop(0, num_plain, take_plain, None)
        jax.lax.fori_loop(num_plain, count, take, None)
        self.turn[0] = self._buffer(base + count)

    def _num_plain(self, walk: Walk, plain_end: Scalar) -> Scalar:
        """Tiles before `plain_end` for each of which there is a whole one to start."""
        C, ahead = self.buffers.shape[2], self.buffers.shape[0] - 1
        if isinstance(plain_end, int) and isinstance(walk.end, int):
            return max(0, min(plain_end // C, walk.end // C - ahead))
        plain, whole = jax.lax.div(plain_end, C), jax.lax.div(walk.end, C)
        return jnp.maximum(0, jnp.minimum(plain, whole - ahead))

    def _buffer(self, number: Scalar) -> Scalar:
        return jax.lax.rem(number, self.buffers.shape[0])

    def _tiles(self, walk: Walk) -> tuple[Scalar, Scalar]:
        """The number of the walk's first tile, and how many there are."""
        C = self.buffers.shape[2]
        if isinstance(walk.start, int) and isinstance(walk.end, int):
            return walk.start // C, pl.cdiv(walk.end, C) - walk.start // C
        first = jax.lax.div(walk.start, C)
        return first, jnp.where(walk.end > walk.start, pl.cdiv(walk.end, C) - first, 0)

    def _start(self, walk: Walk, tile: Scalar, buffer: Scalar) -> None:
        first, low, high = self._blocks(walk, tile)
        is_whole = (low == 0) & (high == self._tile_blocks())
        pl.when(is_whole)(lambda: self._start_all(walk, tile, buffer))

        @pl.when(jnp.logical_not(is_whole))
        def _start_some():
            jax.lax.fori_loop(
                low, high, lambda place, _: self._copy(walk, first, place, buffer), None
            )

    def _start_all(self, walk: Walk, tile: Scalar, buffer: Scalar) -> None:
        """In a straight line, which takes half the cycles of a loop."""
        for place in range(self._tile_blocks()):
            self._copy(walk, tile * self._tile_blocks(), place, buffer)

    def _copy(self, walk: Walk, first: Scalar, place: Scalar, buffer: Scalar) -> None:
        heads = pl.ds(self.first_head, self.buffers.shape[1])
        block = self.pool.at[walk.table[0, first + place], heads]
        slots = self._slots(buffer, place, 1)
        pltpu.make_async_copy(block, slots, self.arrived.at[buffer]).start()

    def _tile_blocks(self) -> int:
        return self.buffers.shape[2] // self.pool.shape[2]

    def _wait(self, walk: Walk, tile: Scalar, buffer: Scalar) -> None:
        """Waits for as many bytes as the tile's copies bring."""
        _, low, high = self._blocks(walk, tile)
        filled = self._slots(buffer, 0, high - low)
        pltpu.make_async_copy(filled, filled, self.arrived.at[buffer]).wait()

    def _blocks(self, walk: Walk, tile: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """The column of a tile's first block, and the places in the tile that are fetched."""
        S, tile_blocks = self.pool.shape[2], self._tile_blocks()
        first = tile * tile_blocks
        low = jnp.maximum(jax.lax.div(walk.start, S) - first, 0)
        high = jnp.minimum(pl.cdiv(walk.end, S) - first, tile_blocks)
        return first, low, high

    def _slots(self, buffer: Scalar, place: Scalar, num_blocks: Scalar) -> Ref:
        S = self.pool.shape[2]
        first = pl.multiple_of(place * S, S)
        size = S if isinstance(num_blocks, int) else pl.multiple_of(num_blocks * S, S)
        return self.buffers.at[buffer, :, pl.ds(first, size), :]


def clear_unseen(
    slots: Ref,  # [K, C, W], of the tokens from `first` on
    first: Scalar,
    walk: Walk,
) -> None:
    """Zeroes what the walk does not see: it may hold NaN, and zero times NaN is NaN."""
    end = first + slots.shape[1]

    @pl.when((first < walk.start) | (end > walk.end))
    def _clear():
        kv = slots[...]
        positions = first + jax.lax.broadcasted_iota(jnp.int32, kv.shape, 1)
        seen = (positions >= walk.start) & (positions < walk.end)
        slots[...] = jnp.where(seen, kv, jnp.zeros_like(kv))
