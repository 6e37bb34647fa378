"""The device that a kernel is compiled for or simulated on, and what it asks of a pool."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

STREAMED_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")  # of pools that can be read
LANES = 128  # of a register
USUAL_RING_BYTES = 6 << 20  # with all the rest it fits the 16 MiB that a v5e program has unasked
BESIDE_RING_BYTES = 12 << 20
SUBLANES = 8  # of a register of 32-bit values; also the rows of a tile of HBM, whatever its dtype


def num_cores(interpret: bool | pltpu.InterpretParams) -> int:
    """How many run one program: a v5p's two are one device, and share a grid's parallel axis."""
    if isinstance(interpret, pltpu.InterpretParams):
        return interpret.num_cores_or_threads
    return pltpu.get_tpu_info().num_cores


def simulator(interpret: bool | pltpu.InterpretParams) -> bool | pltpu.InterpretParams:
    """What `pallas_call` must be told: its own True is no TPU's simulator."""
    return pltpu.InterpretParams() if interpret is True else interpret


def whole_lanes(width: int) -> int:
    """Lanes of the registers that hold so many."""
    return pl.cdiv(width, LANES) * LANES


def streaming_params(
    ring_bytes: int, interpret: bool | pltpu.InterpretParams
) -> pltpu.CompilerParams:
    """Of a kernel whose cores each walk over contexts of their own, through a ring of that size."""
    limit = None  # the compiler's own
    if ring_bytes > USUAL_RING_BYTES:
        # A tile is there once more while its edges are cleared; queries, answers and sums beside.
        limit = 2 * ring_bytes + BESIDE_RING_BYTES
        capacity = limit if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
        if limit > capacity:
            raise ValueError(
                f"a ring of {ring_bytes >> 20} MiB of blocks needs {limit >> 20} MiB of VMEM and "
                f"this TPU has {capacity >> 20}; lower block_size, or use `xla`"
            )
    # Block ids are the scheduler's own; to check each costs more than to start its copy.
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        disable_bounds_checks=True,
        vmem_limit_bytes=limit,
    )


def check_pool(block_size: int, dtype: DTypeLike, dtypes: Sequence[str] = STREAMED_DTYPES) -> None:
    """What a kernel asks beyond what every backend does; raises ValueError."""
    if block_size % SUBLANES:
        raise ValueError(
            f"block size must be a multiple of {SUBLANES}, got {block_size}; or use `xla`"
        )
    name = jnp.dtype(dtype).name
    if name not in dtypes:
        raise ValueError(f"the pool must be one of {dtypes}, got {name}; or use `xla`")
