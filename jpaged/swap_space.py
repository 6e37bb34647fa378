"""Blocks of preempted sequences in host memory: what lies there, and what is on its way."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int32

MAX_MOVED = 32  # blocks of one transfer; a program has one shape, and padding is moved too

Moves = SequenceOf[tuple[int, int]]  # (from, to): a block of the pool and one here, or back


class SwapSpace:
    """Host memory for `num_blocks` blocks, all layers of each together.

    What comes from the device is copied while the step runs; the next step finds it here.
    """

    def __init__(self, num_blocks: int, block_shape: tuple[int, ...], dtype: DTypeLike) -> None:
        # Zero pages take no memory before something is written to them.
        self.blocks = np.zeros((num_blocks, *block_shape), dtype)
        self._arriving: list[tuple[list[int], Array]] = []

    def receive(self, space_ids: list[int], blocks: Float[Array, "X L K S W"]) -> None:
        """Starts the transfer of the first blocks of `blocks` into those of `space_ids`."""
        blocks.copy_to_host_async()
        self._arriving.append((space_ids, blocks))

    def settle(self) -> None:
        """Takes in what has arrived, as it has when the step it came with has been fetched."""
        arriving, self._arriving = self._arriving, []
        for space_ids, blocks in arriving:
            self.blocks[space_ids] = np.asarray(blocks)[: len(space_ids)]

    def padded(self, space_ids: list[int]) -> Float[np.ndarray, "X L K S W"]:
        """A copy of blocks that lie here, and padding behind them."""
        picked = np.zeros((MAX_MOVED, *self.blocks.shape[1:]), self.blocks.dtype)
        picked[: len(space_ids)] = self.blocks[space_ids]
        return picked


def transfers(moves: Moves) -> Iterator[tuple[list[int], list[int]]]:
    """The moves in as few transfers as it takes: where their blocks come from and where they go."""
    for start in range(0, len(moves), MAX_MOVED):
        sources, destinations = zip(*moves[start : start + MAX_MOVED], strict=True)
        yield list(sources), list(destinations)


def padded_ids(block_ids: list[int], padding: int) -> Int32[np.ndarray, " X"]:
    """The block ids of one transfer."""
    padded = np.full(MAX_MOVED, padding, np.int32)
    padded[: len(block_ids)] = block_ids
    return padded
