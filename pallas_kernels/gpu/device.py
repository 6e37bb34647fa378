"""The GPU that a kernel is compiled for, there or not: its name and its compute capability."""

import re
from typing import Any

import jax

# Ahead of time a device has a name alone.
CAPABILITIES = {
    "A100": "8.0",
    "A30": "8.0",
    "A10": "8.6",
    "A10G": "8.6",
    "A40": "8.6",
    "L4": "8.9",
    "L40": "8.9",
    "L40S": "8.9",
    "H100": "9.0",
    "H200": "9.0",
}


def target_chip() -> str | None:
    """The GPU that is compiled for, as H100, A100 or L4; None for any other device.

    Its name ends where its memory or socket begins. A card without such a name has all of its own.
    """
    kind = _target().device_kind
    if not kind.startswith("NVIDIA "):
        return None
    short = re.match(r"NVIDIA ([A-Z]+\d+[A-Z]*)\b", kind)
    return short[1] if short else kind.removeprefix("NVIDIA ").replace(" ", "-")


def target_capability() -> str | None:
    """Its compute capability, as 9.0; None where that is unknown, or there is no GPU."""
    capability = getattr(_target(), "compute_capability", None)
    return capability or CAPABILITIES.get(target_chip() or "")


def as_number(capability: str | None) -> float | None:
    """A compute capability to be compared; None where it is none, as AMD's, which are names."""
    try:
        return None if capability is None else float(capability)
    except ValueError:
        return None


def target_kind() -> str:
    """What the device that is compiled for calls itself."""
    return _target().device_kind


def target_processors() -> int | None:
    """How many multiprocessors it has, where that is known."""
    device = _target()  # which says so as either of the two
    return getattr(device, "num_cores", None) or getattr(device, "core_count", None)


def _target() -> Any:
    """The mesh's device, which need not be there, or else the first there is."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
