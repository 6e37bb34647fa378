"""The kernels as they are compiled ahead of time: functions for `compile_for_gpu`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import PagedBatch, pool_shape
from pallas_kernels.gpu import decode, ragged
from pallas_kernels.gpu.copy import copy_blocks
from pallas_kernels.gpu.tiles import DecodeConfig, choose_decode_config, default_decode_config
from pallas_kernels.gpu.write import write_kv

HEADS = [(32, 8, 128), (9, 3, 64), (14, 2, 64), (8, 2, 80), (7, 1, 96), (4, 1, 256)]
# Each takes registers; all of them at once are the most a model asks for.
OPTIONS = {"window": 1000, "soft_cap": 30.0}
NUM_LAYERS = 30  # whose blocks are copied at once
NUM_TOKENS = 64  # of a write

Built = tuple[Callable[..., Any], tuple[Any, ...]]


def build_decode(
    *,
    heads: tuple[int, int, int] = (9, 3, 64),
    dtype: str = "bfloat16",
    pool_dtype: str | None = None,
    block_size: int = 16,
    num_rows: int = 5,
    max_blocks: int = 80,
    num_blocks: int = 4096,
    **options: Any,
) -> Built:
    """Decode over a pool of `num_blocks`."""
    N, K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)
    if pool_dtype is not None:
        options["kv_scales"] = jnp.ones((2, K))
    return functools.partial(decode.paged_decode, scale=0.2, **options), (
        jax.ShapeDtypeStruct((num_rows, N, H), dtype),
        jax.ShapeDtypeStruct(shape, pool_dtype or dtype),
        jax.ShapeDtypeStruct((num_rows, max_blocks), jnp.int32),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    )


def build_prefill(
    *,
    heads: tuple[int, int, int] = (9, 3, 64),
    dtype: str = "bfloat16",
    pool_dtype: str | None = None,
    block_size: int = 16,
    num_tokens: int = 2048,
    num_rows: int = 5,
    max_blocks: int = 80,
    num_blocks: int = 4096,
    **options: Any,
) -> Built:
    """Prefill over a pool of `num_blocks`."""
    N, K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=block_size, head_size=H)
    shapes = [(num_rows, max_blocks), (num_rows + 1,), (num_rows,), ()]
    integers: Any = [jax.ShapeDtypeStruct(each, jnp.int32) for each in shapes]
    if pool_dtype is not None:
        options["kv_scales"] = jnp.ones((2, K))
    return functools.partial(ragged.paged_prefill, scale=0.2, **options), (
        jax.ShapeDtypeStruct((num_tokens, N, H), dtype),
        jax.ShapeDtypeStruct(shape, pool_dtype or dtype),
        PagedBatch(*integers),
        jax.ShapeDtypeStruct((num_rows, N, H), dtype),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """One of the two attention kernels: how it is built, cut and called."""

    build: Callable[..., Built]
    config_class: type
    choose: Callable[..., Any]  # the cut for a query and a pool: the table's, or else the formula's
    formula: Callable[..., Any]
    kernels: tuple[str, ...]  # that it starts, as they are named on the GPU


ATTENTION = {
    "decode": Attention(
        build=build_decode,
        config_class=DecodeConfig,
        choose=choose_decode_config,
        formula=default_decode_config,
        kernels=("paged_decode", "merge_splits"),
    ),
    "prefill": Attention(
        build=build_prefill,
        config_class=ragged.RaggedConfig,
        choose=ragged.choose_config,
        formula=ragged.default_config,
        kernels=("paged_prefill",),
    ),
}


def build_cut(
    *, kernel: str, config: dict[str, int] | None = None, every_option: bool = False, **shape: Any
) -> tuple[Any, ...]:
    """A kernel cut so, or as it chooses, plain or with every option; and the fields of that cut."""
    attention = ATTENTION[kernel]
    options = dict(OPTIONS) if every_option else {}
    if every_option:
        options["sinks"] = jnp.zeros(shape["heads"][0])
    _, arguments = attention.build(**shape)
    cut = attention.config_class(**config) if config else traced(attention.choose, *arguments[:2])
    function, arguments = attention.build(**shape, **options, config=cut)
    return function, arguments, dataclasses.asdict(cut)


def build_copies(
    *, heads: tuple[int, int, int], dtype: str, pool_dtype: str | None = None
) -> tuple[Any, ...]:
    """Copies of blocks in the pools of a model of many layers; there is no cut to choose."""
    pools = tuple(_pool(heads, pool_dtype or dtype) for _ in range(NUM_LAYERS))
    copies, count = jax.ShapeDtypeStruct((64, 2), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(copy_blocks, donate_argnums=0), (pools, copies, count), {}


def build_write(
    *, heads: tuple[int, int, int], dtype: str, pool_dtype: str | None = None
) -> tuple[Any, ...]:
    """A write of new K and V; nor is there one here."""
    _, K, H = heads
    options = {} if pool_dtype is None else {"kv_scales": jnp.ones((2, K))}
    kv = jax.ShapeDtypeStruct((NUM_TOKENS, K, H), dtype)
    slots = jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.int32)
    write = jax.jit(functools.partial(write_kv, **options), donate_argnums=0)
    return write, (_pool(heads, pool_dtype or dtype), kv, kv, slots), {}


def _pool(heads: tuple[int, int, int], dtype: str) -> jax.ShapeDtypeStruct:
    _, K, H = heads
    shape = pool_shape(num_blocks=1024, num_kv_heads=K, block_size=16, head_size=H)
    return jax.ShapeDtypeStruct(shape, dtype)


def traced(choose: Callable[..., Any], *specs: jax.ShapeDtypeStruct) -> Any:
    """What a function of arrays gives besides, for arrays that are not there."""
    found = []
    jax.eval_shape(lambda *arrays: found.append(choose(*arrays)), *specs)
    return found[0]
