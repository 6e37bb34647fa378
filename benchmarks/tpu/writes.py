"""Probes of `write_kv`: our kernel, and XLA's scatter.

The kernel goes by a list in memory, and the estimator skips what memory decides. So a list is known
here by what decides about loops and branches: all of it decodes, or all of it whole groups. Its
fields are still read, and for each branch whose condition is known there is another one that is
never taken, since to look costs as much as the rest.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from benchmarks.tpu.probe import Probe, Work, kernel_alone
from benchmarks.tpu.probes import abstract_pool
from pallas_kernels import xla
from pallas_kernels.tpu import write as write_kernel
from pallas_kernels.tpu.write import GROUP, HIGH, LOW, NUM_FIELDS, WAITS

CHUNK = 512  # tokens of the row that is a chunk; the others are decodes, each in its own group
BLOCK_SIZE = 16

Heads = tuple[int, int, int]


def write(*, heads: Heads, context: int, fitting: int | None = None) -> Probe:
    """`write_kv` of `context` tokens; `fitting` is the row's own number."""
    length = _item_tokens(fitting)
    with mock.patch.object(write_kernel, "_write_kernel", _kernel_of_known_items(length)):
        function, operands = kernel_alone(write_kernel.write_kv, _arguments(heads, context))
    donated = jax.jit(function, donate_argnums=len(operands) - 1)  # else the pool is copied
    return Probe(donated, operands, _work(heads, context, length), {})


def scatter(*, heads: Heads, context: int, fitting: int | None = None) -> Probe:
    """XLA's write of so many tokens, its whole program; to which slots is nothing to it."""
    function = jax.jit(xla.write_kv, donate_argnums=0)
    work = _work(heads, context, _item_tokens(fitting))
    return Probe(function, _arguments(heads, context), work, {})


def _item_tokens(fitting: int | None) -> int:
    return GROUP if fitting == CHUNK else 1


def _arguments(heads: Heads, num_tokens: int) -> tuple[Any, ...]:
    _, K, _ = heads
    pool = abstract_pool(heads, BLOCK_SIZE, "bfloat16")
    kv = jax.ShapeDtypeStruct((num_tokens, K, pool.shape[3]), pool.dtype)
    return pool, kv, jax.ShapeDtypeStruct((num_tokens,), jnp.int32)


def _work(heads: Heads, num_tokens: int, item_tokens: int) -> Work:
    """Bytes are those of whole groups, stored and, unless they are all new, fetched."""
    _, K, H = heads
    items = num_tokens // item_tokens
    moved = items * (1 if item_tokens == GROUP else 2) * GROUP * K * 2 * H * 2
    return Work(rows=1, tiles=items, kv_bytes=moved, ideal_bytes=moved, flops=0)


def _kernel_of_known_items(length: int) -> Callable[..., None]:
    theirs, merge = write_kernel._write_kernel, write_kernel._merge

    def merge_read(group: Any, words: Any, first: Any, low: "_Bound", high: "_Bound") -> None:
        merge(group, words, first, low.value, high.value)

    def kernel(_, items: Any, *references: Any) -> None:
        num_items = items.shape[1] // NUM_FIELDS // length
        with mock.patch.object(write_kernel, "_merge", merge_read):
            theirs(_Starts(num_items), _Items(items, length), *references)

    return kernel


class _Starts:
    """Stands where the kernel expects a tile's first token, and how many items it has."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def __getitem__(self, index: tuple[Any, int]) -> jax.Array:
        return jnp.int32((0, self.num_items)[index[1]])


class _Items:
    """Stands where the kernel expects its list: no item waits, all have `length` new slots."""

    def __init__(self, reference: Any, length: int) -> None:
        self.reference, self.length = reference, length

    @property
    def shape(self) -> tuple[int, "_Fields"]:
        """The kernel divides the last axis by the number of fields, for a field's length."""
        return 1, _Fields(self.reference.shape[1])

    def __getitem__(self, index: tuple[int, "_Place"]) -> Any:
        _, place = index
        value = self.reference[0, place.name * place.length + place.token]
        if place.name == WAITS:
            self.look(value > 1)
            return 0
        return _Bound(self, value) if place.name in (LOW, HIGH) else value

    def look(self, condition: jax.Array) -> None:
        """A branch that is never taken."""

        @pl.when(condition)
        def _never():
            self.reference[0, 0] = 0


class _Bound:
    """An item's first new slot, or the end of them, as read; how many there are is known."""

    def __init__(self, items: _Items, value: jax.Array) -> None:
        self.items, self.value = items, value

    def __sub__(self, low: "_Bound") -> int:
        self.items.look(self.value - low.value > GROUP)
        return self.items.length


class _Fields:
    """The length of all fields; divided by their number, the place that fields are found from."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __floordiv__(self, count: int) -> "_Place":
        return _Place(self.length // count)


class _Place:
    """An item's field, `name * length + token`, of which the name can still be told."""

    def __init__(self, length: int, name: int = 0, token: Any = None) -> None:
        self.length, self.name, self.token = length, name, token

    def __rmul__(self, name: int) -> "_Place":
        return _Place(self.length, name)

    def __add__(self, token: Any) -> "_Place":
        return _Place(self.length, self.name, token)
