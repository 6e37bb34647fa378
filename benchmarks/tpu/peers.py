"""Probes of JAX's own two TPU kernels, at our shapes.

Their lengths are dynamic, which the estimator takes for nothing: it skips what depends on them.
So the references to lengths are replaced by numbers while the kernels are traced, and while loops
by loops of the same bodies and of a known number of turns. The arithmetic and the copies are
theirs, unchanged.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel as decode_peer
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged_peer

from benchmarks.tpu.probe import Probe, Work, kernel_alone
from benchmarks.tpu.probes import NUM_BLOCKS, num_rows


class _Known:
    """Stands where a kernel expects a reference to lengths: `step * index + start`."""

    def __init__(self, start: int, *, step: int = 0) -> None:
        self.start, self.step = start, step

    def __getitem__(self, index: Any) -> Any:
        return self.start + self.step * index if self.step else self.start


def paged_attention(
    *,
    heads: tuple[int, int, int],
    context: int,
    tile_blocks: int,
    block_size: int = 16,
) -> Probe:
    """JAX's decode kernel; it has no default for `tile_blocks`, its pages of a compute block."""
    N, K, H = heads
    rows = num_rows()
    pages = jax.ShapeDtypeStruct((K, NUM_BLOCKS, block_size, H), jnp.bfloat16)
    theirs = decode_peer.paged_flash_attention_kernel_inline_seq_dim

    def kernel(_, *references: Any, **options: Any) -> None:
        theirs(_Known(context), *references, **options)

    def attend(*arguments: jax.Array) -> jax.Array:
        with mock.patch.object(decode_peer, theirs.__name__, kernel):
            # Without its `jit`, which would remember another probe's lengths.
            return inspect.unwrap(decode_peer.paged_attention)(
                *arguments, pages_per_compute_block=tile_blocks
            )

    function, operands = kernel_alone(
        attend,
        (
            jax.ShapeDtypeStruct((rows, N, H), jnp.bfloat16),
            pages,
            pages,
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows, context // block_size), jnp.int32),
        ),
    )
    kv_bytes = rows * context * K * 2 * H * 2
    work = Work(
        tiles=rows * K * (context // block_size // tile_blocks),
        rows=rows,
        kv_bytes=kv_bytes,
        ideal_bytes=kv_bytes,
        flops=rows * context * N * 4 * H,
    )
    return Probe(function, operands, work, {"blocks": tile_blocks})


def ragged_paged_attention(
    *,
    heads: tuple[int, int, int],
    context: int,
    tile_blocks: int,
    queries: int = 1,
    query_tile: int = 32,
    block_size: int = 16,
) -> Probe:
    """JAX's ragged kernel on one sequence, whose last `queries` tokens are asked.

    A decoding row is alone in its tile of queries here, where as many rows as that has would share
    one, and each go through all its arithmetic.
    """
    N, K, H = heads
    num_queries = -(-queries // query_tile) * query_tile
    tiles = -(-context // (tile_blocks * block_size))
    attend = _ragged_of_known_lengths(
        context,
        queries,
        tiles,
        sm_scale=H**-0.5,
        num_kv_pages_per_block=tile_blocks,
        num_queries_per_block=query_tile,
    )
    function, operands = kernel_alone(
        attend,
        (
            jax.ShapeDtypeStruct((num_queries, N, H), jnp.bfloat16),
            jax.ShapeDtypeStruct((NUM_BLOCKS, block_size, 2 * K, H), jnp.bfloat16),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((1, context // block_size), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
    )
    passes = num_queries // query_tile
    ideal_bytes = context * K * 2 * H * 2
    work = Work(
        tiles=passes * tiles,
        rows=1,
        kv_bytes=passes * ideal_bytes,
        ideal_bytes=ideal_bytes,
        flops=(queries * context - queries * (queries - 1) // 2) * N * 4 * H,
    )
    return Probe(function, operands, work, {"tokens": query_tile, "blocks": tile_blocks})


def _ragged_of_known_lengths(
    context: int, queries: int, tiles: int, **options: Any
) -> Callable[..., jax.Array]:
    """The ragged kernel's call for one sequence, whose context is so many tiles."""
    theirs = ragged_peer.ragged_paged_attention_kernel

    def kernel(_kv_lens, tables, _starts, state, _num_seqs, *references: Any, **options: Any):
        known = (_Known(context), tables, _Known(0, step=queries), state, _Known(1))
        with _known_turns(tiles):
            theirs(*known, *references, **options)

    def attend(*arguments: jax.Array) -> jax.Array:
        with mock.patch.object(ragged_peer, theirs.__name__, kernel):
            return inspect.unwrap(ragged_peer.ragged_paged_attention)(*arguments, **options)

    return attend


@contextlib.contextmanager
def _known_turns(tiles: int) -> Iterator[None]:
    """The ragged kernel's loops: one turn over sequences, `tiles` over a sequence's tiles."""

    def while_loop(condition: Callable[..., Any], body: Callable[..., Any], state: Any) -> Any:
        if condition.__name__ == "is_cur_q_blk_needed":
            return body(state)
        return jax.lax.fori_loop(0, tiles, lambda _, state: body(state), state)

    with mock.patch.object(jax.lax, "while_loop", while_loop):
        yield
