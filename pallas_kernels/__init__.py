"""Attention over a paged pool of keys and values: arrays in, arrays out."""

from pallas_kernels.backends import Backend, check_pool_of, choose_backend, default_backend
from pallas_kernels.dispatch import (
    copy_blocks,
    paged_attention,
    paged_decode,
    write_blocks,
    write_kv,
)
from pallas_kernels.layout import (
    NULL_BLOCK,
    PagedBatch,
    pool_shape,
    positions_of_tokens,
    rows_of_tokens,
    slots_of_tokens,
)
from pallas_kernels.product import matrix_product
from pallas_kernels.quantize import kv_scales_of
from pallas_kernels.storage import pool_format, row_bytes
from pallas_kernels.xla import read_blocks

__all__ = [
    "NULL_BLOCK",
    "Backend",
    "PagedBatch",
    "check_pool_of",
    "choose_backend",
    "copy_blocks",
    "default_backend",
    "kv_scales_of",
    "matrix_product",
    "paged_attention",
    "paged_decode",
    "pool_format",
    "pool_shape",
    "positions_of_tokens",
    "read_blocks",
    "row_bytes",
    "rows_of_tokens",
    "slots_of_tokens",
    "write_blocks",
    "write_kv",
]
