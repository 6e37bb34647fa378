"""Decode attention by others from within JAX, at the shapes and by the method of the part decode.

Each lies in memory as its own kernel wants it. One that is not installed, or refuses a shape, is
named with its reason. FlashAttention-3 comes with the wheel flash-attn3-jax.
"""

import functools
import importlib
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.decode import DecodeShape, Layout, Side, measure, shapes_for
from benchmarks.gpu.settings import Record, Settings

FA3_SPLITS = (1, 4, 16)  # it does not choose for itself here


def run(settings: Settings, record: Record) -> None:
    """Records each peer of each shape."""
    measure({shape: _sides(shape) for shape in shapes_for(settings)}, settings, record)
    if not _has_fa3():
        record("flash-attention-3", {"ok": True, "error": "flash_attn3_jax is not installed"})


def _sides(shape: DecodeShape) -> dict[str, Side]:
    sides = {
        "cudnn contiguous": Side(
            functools.partial(_cudnn_contiguous, scale=shape.scale), Layout.CONTIGUOUS, is_peer=True
        ),
        "cudnn paged": Side(
            functools.partial(_cudnn_paged, scale=shape.scale), Layout.PAGES, is_peer=True
        ),
        "jax paged_attention": Side(
            functools.partial(_jax_op, scale=shape.scale), Layout.HEAD_PAGES, is_peer=True
        ),
    }
    if _has_fa3():
        for splits in FA3_SPLITS:
            attend = functools.partial(_fa3, scale=shape.scale, num_splits=splits)
            sides[f"fa3 {splits} splits"] = Side(attend, Layout.PAGES, is_peer=True)
    return sides


def _has_fa3() -> bool:
    return importlib.util.find_spec("flash_attn3_jax") is not None


def _cudnn_contiguous(q: Any, kv: Any, tables: Any, lens: Any, *, scale: float) -> jax.Array:  # noqa: ARG001
    """Every row at its whole length, as they all are here."""
    out = jax.nn.dot_product_attention(q[:, None], *kv, scale=scale, implementation="cudnn")
    return out[:, 0]


def _cudnn_paged(q: Any, kv: Any, tables: Any, lens: Any, *, scale: float) -> jax.Array:
    """The paged attention of cuDNN, which JAX has without a public name."""
    cudnn: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    pages = (tables - 1)[:, None, :, None]
    out = cudnn.paged_attention(
        q[:, None],
        *kv,
        jnp.ones_like(lens),
        lens,
        pages,
        pages,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING,
    )
    return out[0][:, 0] if isinstance(out, tuple | list) else out[:, 0]


def _jax_op(q: Any, kv: Any, tables: Any, lens: Any, *, scale: float) -> jax.Array:
    """JAX's own op; it leaves scaling to its caller."""
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    columns = tables.shape[1]
    splits = math.gcd(columns, 16)
    per_block = math.gcd(columns // splits, 8)
    options = {"k_splits": splits, "pages_per_compute_block": per_block}
    return module.paged_attention((q * scale).astype(q.dtype), *kv, tables - 1, lens, **options)


def _fa3(q: Any, kv: Any, tables: Any, lens: Any, *, scale: float, num_splits: int) -> jax.Array:
    flash_mha_with_kvcache = importlib.import_module("flash_attn3_jax").flash_mha_with_kvcache

    out = flash_mha_with_kvcache(
        q[:, None],
        *kv,
        cache_seqlens=lens,
        page_table=tables - 1,
        softmax_scale=scale,
        num_splits=num_splits,
    )
    return out[:, 0]
