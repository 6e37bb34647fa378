"""Lowering for an NVIDIA GPU as far as Triton's language, which needs no compiler."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from benchmarks.gpu.topology import abstract_mesh

# Of a pool, in the long matrix.
EIGHT_BITS = [
    pytest.param("int8", marks=pytest.mark.kernels),
    pytest.param("float8_e4m3fn", marks=pytest.mark.kernels),
]


def num_lowered_for_cuda(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Kernels of a function that come as far as Triton's language; this needs no plugin."""
    with jax.sharding.use_abstract_mesh(abstract_mesh("sm_90a")):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("__gpu$xla.gpu.triton")
