"""Runs a TPU kernel in the simulator, and says whether it saw a race."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import decode, ragged, write

# The default of 2 gives all copies one clock, which orders them: a planted race was not found.
CLOCKS = 64


class Outcome(NamedTuple):
    """What the kernel gave, and whether the simulator saw a race."""

    out: np.ndarray
    raced: bool


class Races:
    """What the simulator saw; each run of a kernel has a state of its own, and ends the last."""

    def __init__(self, new_state: Callable[..., Any]):
        self._new_state, self._state, self._found, self.num_runs = new_state, None, False, 0

    @property
    def found(self) -> bool:
        return self._found or (self._state is not None and self._state.races_found)

    def start(self, *args: Any, **kwargs: Any) -> Any:
        self._found = self.found
        self._state = self._new_state(*args, **kwargs)
        self.num_runs += 1
        return self._state


def simulate(kernel: Callable[[pltpu.InterpretParams], jax.Array], **params: Any) -> Outcome:
    """Calls `kernel` with a mode in which fresh memory is NaN and races are looked for."""
    with watched_races() as races:
        return Outcome(np.asarray(kernel(strict_mode(**params))), races.found)


@contextlib.contextmanager
def strictly_simulated() -> Iterator[None]:
    """Within, `interpret=True` is a strict mode too; at the end no kernel may have had a race.

    For what is traced within: a compiled step keeps the mode that it was traced with.
    """

    def simulator(interpret: bool | pltpu.InterpretParams) -> bool | pltpu.InterpretParams:
        return strict_mode() if interpret is True else interpret

    with contextlib.ExitStack() as stack:
        races = stack.enter_context(watched_races())
        for module in (decode, ragged, write):
            stack.enter_context(mock.patch.object(module, "simulator", simulator))
        yield
        jax.effects_barrier()  # a step may still run
        assert races.num_runs, "no kernel was simulated"
        assert not races.found, "there was a race; the simulator has logged where"


def strict_mode(**params: Any) -> pltpu.InterpretParams:
    """Fresh memory is NaN, and races are looked for."""
    if hasattr(pltpu.InterpretParams, "on_race"):  # later versions would raise
        params["on_race"] = "warn"
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", vector_clock_size=CLOCKS, **params
    )


@contextlib.contextmanager
def watched_races() -> Iterator[Races]:
    """The races of kernels that run within; the simulator is as new afterwards.

    Its race flag is private and that of the last run, and in JAX 0.10 it has no other form.
    """
    simulator = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    races = Races(simulator.RaceDetectionState)
    try:
        with mock.patch.object(simulator, "RaceDetectionState", races.start):
            yield races
    finally:
        pltpu.reset_tpu_interpret_mode_state()
