"""How many cores run one program: a v5p's two are one device, and share a grid's parallel axis."""

from jax.experimental.pallas import tpu as pltpu


def num_cores(interpret: bool | pltpu.InterpretParams) -> int:
    """Of the device that is compiled for, or of the one that is simulated."""
    if isinstance(interpret, pltpu.InterpretParams):
        return interpret.num_cores_or_threads
    return pltpu.get_tpu_info().num_cores
