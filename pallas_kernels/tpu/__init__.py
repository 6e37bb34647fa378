"""Pallas kernels for TPUs, v4 and later."""

from pallas_kernels.tpu.decode import paged_decode

__all__ = ["paged_decode"]
