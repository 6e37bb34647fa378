"""The device that a kernel is compiled for or simulated on, and what it asks of a pool."""

from collections.abc import Sequence

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Real

LANES = 128  # of a register
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


def check_pool(pool: Real[Array, "P K S W"], dtypes: Sequence[str]) -> None:
    """What a kernel asks beyond what `dispatch` asked for every backend."""
    S = pool.shape[2]
    if S % SUBLANES:
        raise ValueError(f"block size must be a multiple of {SUBLANES}, got {S}; or use `xla`")
    if pool.dtype.name not in dtypes:
        raise ValueError(f"the pool must be one of {dtypes}, got {pool.dtype}; or use `xla`")
