"""Pallas kernels for TPUs, v4 and later."""

from pallas_kernels.tpu.decode import paged_decode
from pallas_kernels.tpu.write import write_kv

__all__ = ["paged_decode", "write_kv"]
