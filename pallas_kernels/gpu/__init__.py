"""Pallas kernels for NVIDIA GPUs of compute capability 8.0 and later, through Triton."""

from pallas_kernels.gpu.decode import paged_decode
from pallas_kernels.gpu.tiles import DecodeConfig, decode_config

__all__ = ["DecodeConfig", "decode_config", "paged_decode"]
