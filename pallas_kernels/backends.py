"""The backends, and the one place that chooses one."""

import enum
import functools
import logging
from typing import Any

import jax
from jax.typing import DTypeLike

from pallas_kernels.cpu import kernels as cpu
from pallas_kernels.cpu.build import BuildError
from pallas_kernels.gpu import common as gpu
from pallas_kernels.gpu.device import as_number
from pallas_kernels.gpu.mosaic import limits as mosaic
from pallas_kernels.tpu import device as tpu

logger = logging.getLogger(__name__)  # unconfigured, Python prints its warnings on stderr


class Backend(enum.Enum):
    """Which code computes attention over the pool."""

    REFERENCE = "reference"
    XLA = "xla"
    CPU = "cpu"  # C++ through jax.ffi, compiled on this machine
    PALLAS_TPU = "pallas-tpu"
    PALLAS_TPU_INTERPRET = "pallas-tpu-interpret"  # the TPU kernel simulated, for tests
    PALLAS_GPU = "pallas-gpu"
    PALLAS_GPU_INTERPRET = "pallas-gpu-interpret"  # the GPU kernel on any device, for tests
    MOSAIC_GPU = "mosaic-gpu"  # for Hopper alone, through Mosaic where `pallas-gpu` is Triton
    MOSAIC_GPU_INTERPRET = "mosaic-gpu-interpret"  # the same simulated, for tests

    @property
    def is_interpreted(self) -> bool:
        """Whether it is a simulation of kernels for another device."""
        return self.value.endswith("-interpret")


OLD_TPUS = ("TPU v2", "TPU v3")  # with too few semaphores for the copies on their way
MIN_CAPABILITY = 8.0  # of a GPU: XLA compiles no Triton below
TPU_BACKENDS = (Backend.PALLAS_TPU, Backend.PALLAS_TPU_INTERPRET)
GPU_BACKENDS = (Backend.PALLAS_GPU, Backend.PALLAS_GPU_INTERPRET)
MOSAIC_BACKENDS = (Backend.MOSAIC_GPU, Backend.MOSAIC_GPU_INTERPRET)


def default_backend(platform: str | None = None) -> Backend:
    """The best backend of a platform ("tpu", "gpu", "cpu"; by default the first device's)."""
    platform = platform or jax.devices()[0].platform
    if platform == "cpu":
        try:
            cpu.prepare()
        except BuildError as reason:
            _warn_once(f"attention by xla, the CPU kernels are missing: {reason}")
        else:
            return Backend.CPU
    kernels = {"gpu": Backend.PALLAS_GPU, "tpu": Backend.PALLAS_TPU}.get(platform)
    if kernels is not None:
        reason = _unfit(kernels)
        if reason is None:
            return kernels
        _warn_once(f"attention by xla, the {platform.upper()} kernels cannot run: {reason}")
    return Backend.XLA


def choose_backend(name: str, platform: str) -> Backend:
    """The backend of a name; "auto" is the platform's default.

    Raises ValueError for a name that does not exist or cannot run on the platform.
    """
    if name == "auto":
        return default_backend(platform)
    try:
        backend = Backend(name)
    except ValueError:
        names = ["auto", *(backend.value for backend in Backend)]
        raise ValueError(f"attention_backend must be one of {names}, got {name!r}") from None
    needs = {
        Backend.CPU: "cpu",
        Backend.PALLAS_TPU: "tpu",
        Backend.PALLAS_GPU: "gpu",
        Backend.MOSAIC_GPU: "gpu",
    }
    needed = needs.get(backend, platform)
    if platform != needed:
        raise ValueError(f"attention_backend={name!r} needs a {needed}, this is a {platform}")
    if backend is Backend.CPU:
        try:
            cpu.prepare()
        except BuildError as reason:
            raise ValueError(f"attention_backend='cpu' cannot be compiled: {reason}") from reason
    if reason := _unfit(backend):
        raise ValueError(f"attention_backend={name!r} cannot run: {reason}; use 'xla'")
    return backend


def check_pool_of(
    backend: Backend,
    *,
    block_size: int,
    dtype: DTypeLike,
    head_size: int,
    queries_per_head: int = 1,
) -> None:
    """Raises ValueError where the backend takes no such pool or queries, before there are any."""
    if backend in TPU_BACKENDS:
        tpu.check_pool(block_size, dtype)
    if backend in MOSAIC_BACKENDS:
        mosaic.check_pool(block_size=block_size, dtype=dtype, head_size=head_size)
        mosaic.check_group(queries_per_head)
    if backend is Backend.PALLAS_GPU:
        gpu.check_capability(dtype, _capability(jax.devices()[0]))


def _unfit(backend: Backend) -> str | None:
    """Why a backend's kernels cannot run on the first device, or None."""
    device = jax.devices()[0]
    if backend is Backend.PALLAS_TPU:
        kind = device.device_kind
        return f"they need a TPU v4 or later, this is a {kind}" if kind in OLD_TPUS else None
    if backend in MOSAIC_BACKENDS:
        if reason := mosaic.missing_jax(interpreted=backend.is_interpreted):
            return reason
        if not backend.is_interpreted and _capability(device) != mosaic.HOPPER:
            return _needs_capability(f"{mosaic.HOPPER} (Hopper)", device)
    if backend is Backend.PALLAS_GPU and _capability(device) < MIN_CAPABILITY:
        return _needs_capability(str(MIN_CAPABILITY), device)
    return None


def _capability(device: Any) -> float:
    """A GPU's compute capability; 0 where it has none."""
    return as_number(getattr(device, "compute_capability", None)) or 0.0


def _needs_capability(needed: str, device: Any) -> str:
    found = getattr(device, "compute_capability", None) or "none"
    return f"they need compute capability {needed}, {device.device_kind} has {found}"


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
