"""Pallas kernels for TPUs, v4 and later.

What they are given was looked at by `pallas_kernels.checks`; called by themselves, they do not
look.
"""

from pallas_kernels.tpu.decode import DecodeTile, paged_decode
from pallas_kernels.tpu.ragged import RaggedTile, paged_prefill
from pallas_kernels.tpu.write import write_kv

__all__ = ["DecodeTile", "RaggedTile", "paged_decode", "paged_prefill", "write_kv"]
