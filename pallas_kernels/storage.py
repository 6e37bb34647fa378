"""How a pool lies in a device's memory."""

import jax
from jax.experimental.layout import Format, Layout
from jax.typing import DTypeLike

from pallas_kernels.backends import Backend
from pallas_kernels.tpu.device import whole_lanes


def row_bytes(head_size: int, dtype: DTypeLike, backend: Backend) -> int:
    """Bytes that K and V of one slot and head take there."""
    lanes = 2 * head_size
    if backend is Backend.PALLAS_TPU:  # whose rows begin where a register does
        lanes = whole_lanes(lanes)
    return lanes * jax.numpy.dtype(dtype).itemsize


def pool_format(backend: Backend) -> Format | None:
    """What a pool's format must be in a jit's arguments and results; None is JAX's own choice.

    Where 2H is no multiple of 128, XLA on a TPU would have a pool lie with P innermost, which
    leaves no lane empty and no kernel can read: each step would copy it, there and back. On the
    device of the mesh that is set, or else on the first one.
    """
    if backend is not Backend.PALLAS_TPU:
        return None
    mesh = jax.sharding.get_mesh()
    sharding = (
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if mesh.empty
        else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    return Format(Layout(major_to_minor=(0, 1, 2, 3)), sharding)
