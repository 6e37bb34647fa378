"""Runs a TPU kernel in the simulator, and says whether it saw a race."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

# The default of 2 gives all copies one clock, which orders them: a planted race was not found.
CLOCKS = 64


class Outcome(NamedTuple):
    """What the kernel gave, and whether the simulator saw a race."""

    out: np.ndarray
    raced: bool


def simulate(kernel: Callable[[pltpu.InterpretParams], jax.Array], **params: Any) -> Outcome:
    """Calls `kernel` with a mode in which fresh memory is NaN and races are looked for.

    The simulator's race flag is private, and in JAX 0.10 it has no other form.
    """
    simulator = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    if hasattr(pltpu.InterpretParams, "on_race"):  # later versions would raise
        params["on_race"] = "warn"
    mode = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", vector_clock_size=CLOCKS, **params
    )
    try:
        return Outcome(np.asarray(kernel(mode)), simulator.races.races_found)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
