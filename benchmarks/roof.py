"""What a decode step costs at least on this machine: its products alone, and its live KV read once.

Counted are the weights' bytes, read once a step however many rows there are, and the bytes of K and
V that the rows attend to; activations are small beside both. The time of the products is measured,
since a CPU is at its memory's limit with one row and at its arithmetic's with many; the time of the
KV is its bytes at the rate at which this machine reads a large array.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpaged_models import Decoder

REPEATS = 9
READ_ELEMENTS = 2**27  # float32: half a gigabyte, more than any cache holds


class Weight(NamedTuple):
    """A matrix that every row is multiplied with, and which of its axes goes with the row's."""

    matrix: Float[Array, "A B"]
    axis: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """The least that a decode step does, and takes."""

    weight_bytes: int
    kv_bytes: int
    flops: int
    products_ms: float
    kv_ms: float

    @property
    def ms(self) -> float:
        """Milliseconds: products and KV after each other, since each layer waits for the last."""
        return self.products_ms + self.kv_ms


def step_roof(weights: list[Weight], *, rows: int, kv_bytes: int) -> Roof:
    """The roof of a decode step with `rows` rows whose contexts take `kv_bytes`."""
    return Roof(
        weight_bytes=sum(weight.matrix.nbytes for weight in weights),
        kv_bytes=kv_bytes,
        flops=2 * rows * sum(weight.matrix.size for weight in weights),
        products_ms=_products_ms(weights, rows),
        kv_ms=kv_bytes / _read_gbps() / 1e6,
    )


def weights_of(decoder: Decoder) -> list[Weight]:
    """The matrices of all layers, stored [in, out], and the head's, [out, in], at the end."""
    state = nnx.state(decoder, nnx.Param)
    weights = [
        Weight(leaf.reshape(leaf.shape[0], -1), axis=0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["layers"])
        if leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path)
    ]
    (head,) = jax.tree.leaves(
        state["embedding"] if decoder.config.tie_word_embeddings else state["head"]
    )
    return [*weights, Weight(head, axis=1)]


def _read_gbps() -> float:
    """10^9 bytes a second at which this machine reads one large array."""
    x = jnp.ones(READ_ELEMENTS, jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / _best_ms(lambda: total(x)) / 1e6


def _products_ms(weights: list[Weight], rows: int) -> float:
    """All products, each after the one before it, with nothing between them."""
    axes = [axis for _, axis in weights]
    rows = rows if rows > 1 or weights[0].matrix.dtype == jnp.float32 else 2  # as the models do

    inputs = {
        matrix.shape[axis]: jnp.ones((rows, matrix.shape[axis]), matrix.dtype)
        for matrix, axis in weights
    }

    @jax.jit
    def multiply(matrices: list[Float[Array, "A B"]], inputs: dict[int, Array]) -> Array:
        last = jnp.zeros((), matrices[0].dtype)
        for matrix, axis in zip(matrices, axes, strict=True):
            x = inputs[matrix.shape[axis]] + last
            product = jax.lax.dot_general(
                x, matrix, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
            )
            # Else the compiler would see that one element of each is all that is asked for.
            product = jax.lax.optimization_barrier(product)
            last = (product[0, 0] * 1e-9).astype(matrix.dtype)
        return last

    matrices = [matrix for matrix, _ in weights]
    return _best_ms(lambda: multiply(matrices, inputs))


def _best_ms(run: Callable[[], Array]) -> float:
    """The best of several runs: a roof is what the machine can do when it is left alone."""
    run().block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3
