"""What a decode step costs at least on this machine: its products alone, and its live KV read once.

Counted are the weights' bytes, read once a step however many rows there are, and the bytes of K and
V that the rows attend to; activations are small beside both. The time of the products is measured,
since a CPU is at its memory's limit with one row and at its arithmetic's with many; the time of the
KV is its bytes at the rate at which this machine reads a large array.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jpaged_models import Decoder
from pallas_kernels import matrix_product

READ_BYTES = 2**29  # more than any cache holds
# The side of a square product that keeps every unit busy: milliseconds here, no more.
PRODUCT_SIZE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


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


def roof_of(
    weights: list[Weight], *, rows: int, kv_bytes: int, products_ms: float, read_gbps: float
) -> Roof:
    """The roof of a decode step with `rows` rows whose contexts take `kv_bytes`."""
    return Roof(
        weight_bytes=sum(weight.matrix.nbytes for weight in weights),
        kv_bytes=kv_bytes,
        flops=2 * rows * sum(weight.matrix.size for weight in weights),
        products_ms=products_ms,
        kv_ms=kv_bytes / read_gbps / 1e6,
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


def read_large() -> Callable[[], object]:
    """Reads READ_BYTES of one array, and waits."""
    x = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(x).block_until_ready()


def multiply_large(dtype: DTypeLike) -> tuple[Callable[[], object], int]:
    """Multiplies two large square matrices, and waits; and how many operations that is.

    On a CPU in float32, whatever the dtype: nothing is multiplied faster there.
    """
    platform = jax.devices()[0].platform
    size = PRODUCT_SIZE[platform]
    x = jnp.ones((size, size), jnp.float32 if platform == "cpu" else dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x).block_until_ready(), 2 * size**3


def products(weights: list[Weight], rows: int) -> Callable[[], object]:
    """Does all products, each after the one before it and with nothing between them, and waits."""
    axes = [axis for _, axis in weights]
    inputs = {
        matrix.shape[axis]: jnp.ones((rows, matrix.shape[axis]), matrix.dtype)
        for matrix, axis in weights
    }

    @jax.jit
    def multiply(matrices: list[Float[Array, "A B"]], inputs: dict[int, Array]) -> Array:
        last = jnp.zeros((), matrices[0].dtype)
        for matrix, axis in zip(matrices, axes, strict=True):
            x = inputs[matrix.shape[axis]] + last
            product = matrix_product(x, matrix, is_transposed=axis == 1)
            # Else the compiler would see that one element of each is all that is asked for.
            product = jax.lax.optimization_barrier(product)
            last = (product[0, 0] * 1e-9).astype(matrix.dtype)
        return last

    matrices = [matrix for matrix, _ in weights]
    return lambda: multiply(matrices, inputs).block_until_ready()
