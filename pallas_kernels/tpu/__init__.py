"""Pallas kernels for TPUs, v4 and later."""

from pallas_kernels.tpu.decode import DecodeTile, paged_decode
from pallas_kernels.tpu.ragged import RaggedTile, paged_prefill
from pallas_kernels.tpu.write import write_kv

__all__ = ["DecodeTile", "RaggedTile", "paged_decode", "paged_prefill", "write_kv"]
