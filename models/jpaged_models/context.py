"""What the layers of one step share.

JAX also builds these classes around specs, so their shapes are for the reader alone.
"""

import dataclasses
import enum

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import Backend, PagedBatch

Pools = tuple[Float[Array, "P K S W"], ...]


class Phase(enum.Enum):
    """What a step's rows may hold: one token each, or chunks of any length."""

    DECODE = "decode"
    MIXED = "mixed"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepContext:
    """What every layer of one step shares. In phase DECODE, T == B and token r is row r's."""

    batch: PagedBatch
    positions: Int32[Array, " T"]
    slots: Int32[Array, " T"]
    phase: Phase = dataclasses.field(metadata={"static": True})
    backend: Backend = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosines and sines of each token's rotation."""

    cos: Float[Array, "T A"]
    sin: Float[Array, "T A"]
