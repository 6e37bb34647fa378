"""The TPU kernels through the real compiler, on a machine without a TPU."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu.topology import compile_for_tpu, missing_libtpu
from pallas_kernels import pool_shape
from pallas_kernels.tpu import decode
from tests.kernels.write_before import write_before

pytestmark = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")


@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)])
def test_decode_reads_the_donated_pool_in_place_right_after_it_was_written(
    heads: tuple[int, int, int],
):
    compiled = compile_for_tpu(f"{__name__}:build_write_and_decode", options={"heads": heads})
    shape = pool_shape(num_blocks=512, num_kv_heads=heads[1], block_size=16, head_size=heads[2])
    pool_bytes = 2 * math.prod(shape)
    assert compiled.alias_bytes == pool_bytes  # so it is not padded either
    assert compiled.temporary_bytes < pool_bytes // 64
    assert 'custom_call_target="tpu_custom_call"' in compiled.hlo
    shape_text = re.escape(f"bf16[{','.join(map(str, shape))}]")
    assert re.search(rf" = {shape_text}\S* (parameter|fusion)\(", compiled.hlo)
    assert not re.search(rf" = {shape_text}\S* (copy|copy-start|transpose|convert)", compiled.hlo)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": (14, 2, 64), "block_size": 8},
        {"heads": (4, 1, 256), "dtype": "float32", "window": 300, "soft_cap": 30.0},
        {"heads": (32, 32, 128), "num_rows": 256, "max_blocks": 1024},
    ],
    ids=["half-a-bf16-tile", "float32-window-soft-cap", "a-table-larger-than-smem"],
)
def test_decode_compiles_without_temporaries(options: dict[str, Any]):
    compiled = compile_for_tpu(f"{__name__}:build_decode", options=options)
    assert compiled.temporary_bytes < 1 << 20


def test_what_does_not_compile_says_so():
    with pytest.raises(RuntimeError, match=r"build_decode did not compile for v5e(.|\n)*float16"):
        compile_for_tpu(f"{__name__}:build_decode", options={"dtype": "float16"})


def build_decode(
    *,
    heads: tuple[int, int, int] = (9, 3, 64),
    dtype: str = "bfloat16",
    block_size: int = 16,
    num_rows: int = 5,
    max_blocks: int = 80,
    num_blocks: int = 512,
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Decode over a pool of `num_blocks`, for `compile_for_tpu`."""
    N, K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)

    def attend(q, pool, block_tables, seq_lens):
        # Tables and lengths made inside, as a step makes them from its state.
        return decode.paged_decode(q, pool, block_tables + 1, seq_lens + 1, scale=0.2, **options)

    return attend, (
        jax.ShapeDtypeStruct((num_rows, N, H), dtype),
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((num_rows, max_blocks), jnp.int32),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    )


def build_write_and_decode(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step's use of one layer's pool, donated: new K and V are written, then read."""
    return write_before(*build_decode(**options))
