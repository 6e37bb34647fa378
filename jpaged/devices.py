"""The device to run on, and a clear word where JAX cannot use the one that is there."""

import importlib.metadata
import os
import pathlib
from typing import Protocol

import jax

# The distribution that brings a device's plugin, the extra that installs a matching one, and a
# pattern of files of which one exists where the device does.
_PLUGINS = (
    ("jax-cuda12-plugin", "cuda12", "dev/nvidiactl"),
    ("jax-cuda13-plugin", "cuda13", "dev/nvidiactl"),
    ("libtpu", "tpu", "dev/accel[0-9]*"),
    ("libtpu", "tpu", "dev/vfio/[0-9]*"),  # v5e and later
)


class Device(Protocol):
    """What is asked of a JAX device (`jax.Device` itself is no type to a type checker)."""

    platform: str

    def memory_stats(self) -> dict[str, int] | None:
        """Bytes in use and the limit, where the platform knows them."""
        ...


def num_cores() -> int:
    """Of the processor, that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def first_device() -> Device:
    """The first device, after making sure that a plugin that does not fit was not passed over."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not jax.config.values["jax_platforms"]:
        _refuse_silent_fallback()
    return device


def _refuse_silent_fallback() -> None:
    """Raises where a GPU or TPU and its plugin are there, and JAX still chose the CPU."""
    jaxlib = importlib.metadata.version("jaxlib")
    for distribution, extra, pattern in _PLUGINS:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        device_file = next(pathlib.Path("/").glob(pattern), None)
        if device_file is None:
            continue
        raise RuntimeError(
            f"{distribution} {version} is installed and {device_file} exists, but JAX (jaxlib "
            f"{jaxlib}) found only the CPU: the versions or the driver do not match. Install "
            f"jpaged again with its extra (in its clone: `pip install -U '.[{extra}]'`) and "
            "restart, or set JAX_PLATFORMS=cpu to mean it."
        )
