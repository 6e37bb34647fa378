"""Online softmax over tiles of K|V (Milakov and Gimelshein, arXiv 1805.02867)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from pallas_kernels.layout import MASKED
from pallas_kernels.tpu.device import LANES
from pallas_kernels.tpu.ring import Ref

LOG2_E = 1.4426950408889634


class Softmax(NamedTuple):
    """What is known of X heads with Q queries each, in VMEM and in float32.

    A column has whole registers: the highest logit stands in all lanes, which spares the steps
    that spread it, and the lanes of a sum are added up only in the end.
    """

    high: Ref  # [X, Q, LANES], the highest logit, of base 2, in each lane
    total: Ref  # [X, Q, LANES], the sum of weights is the sum over lanes
    values: Ref  # [X, Q, V], the weighted sum of values, in its last H lanes

    def reset(self, sinks: Ref | None) -> None:  # f32[X, Q or 1, 1]
        """Nothing is seen yet; a sink is a logit that is there from the start, without a value."""
        shape = self.high.shape
        if sinks is None:
            self.high[...] = jnp.full(shape, MASKED, jnp.float32)
            self.total[...] = jnp.zeros(shape, jnp.float32)
        else:
            # Finite: of an infinite highest logit nothing can be subtracted.
            high = jnp.minimum(sinks[...] * LOG2_E, jnp.finfo(jnp.float32).max)
            self.high[...] = jnp.broadcast_to(high, shape)
            self.total[...] = jnp.full(shape, 1 / LANES, jnp.float32)
        self.values[...] = jnp.zeros(self.values.shape, jnp.float32)

    def result(self, place: int | jax.Array) -> Float[Array, "Q V"]:
        """A head's answer, zeros where a query has seen nothing."""
        total = jnp.sum(self.total[place], axis=1, keepdims=True)
        return self.values[place] / jnp.where(total > 0, total, 1)


class Head(NamedTuple):
    """A head's place in the softmax, its queries, and the tile that they meet."""

    place: int | jax.Array
    q: Float[Array, "Q V"]  # zero behind its first H lanes
    kv: Ref  # [C, W]
    scale: float | Float[Array, ""]

    def keys(self) -> Float[Array, "C V"]:
        """In the query's dtype, loaded at each call."""
        return self.kv[:, : head_lanes(self.kv.shape[1])].astype(self.q.dtype)

    def values(self) -> Float[Array, "C V"]:
        """Likewise."""
        W = self.kv.shape[1]
        return self.kv[:, W - head_lanes(W) :].astype(self.q.dtype)


def compute_dtype(q: Float[Array, "..."], pool: Real[Array, "..."]) -> jnp.dtype:
    """What queries, keys and values are multiplied in; a quantised pool's are exact in either."""
    if pool.dtype in (jnp.bfloat16, jnp.float32):
        return pool.dtype
    return jnp.dtype(jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32)


def splits(lanes: int) -> bool:
    """Whether keys and values of a row of 2H lanes fill registers of their own.

    If not, nothing is cut: with a query that is zero in the value lanes the product of whole rows
    is q.k, and of the weighted rows the value lanes are the answer.
    """
    return lanes % (2 * LANES) == 0


def head_lanes(lanes: int) -> int:
    """The lanes of a query and of an answer, for rows of 2H lanes."""
    return lanes // 2 if splits(lanes) else lanes


def absorb(
    state: Softmax,
    heads: Sequence[Head],
    visible: Bool[Array, "Q C"] | None,
    *,
    soft_cap: float | None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Takes one tile in, for all the heads stage by stage; `meanwhile` is called between two.

    Head by head, each would wait for the matrix unit, the maximum and the exponential in turn: the
    compiler cannot tell that what it stores of one head is not what it loads of the next.
    """
    logits = [_logits(head, visible, soft_cap) for head in heads]
    if meanwhile is not None:
        meanwhile()
    old_highs = [state.high[head.place] for head in heads]
    old_totals = [state.total[head.place] for head in heads]
    old_values = [state.values[head.place] for head in heads]
    highs = [
        jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        for old, x in zip(old_highs, logits, strict=True)
    ]
    weights = [
        jnp.exp2(x - _spread(high, x.shape[1])) for x, high in zip(logits, highs, strict=True)
    ]
    weighted = [
        _dot(w.astype(head.q.dtype), head.values(), 0)
        for w, head in zip(weights, heads, strict=True)
    ]
    shrinks = [jnp.exp2(old - high) for old, high in zip(old_highs, highs, strict=True)]
    for i, head in enumerate(heads):
        spread = _spread(shrinks[i], old_values[i].shape[1])
        state.high[head.place] = highs[i]
        state.total[head.place] = old_totals[i] * shrinks[i] + _fold(weights[i])
        state.values[head.place] = old_values[i] * spread + weighted[i]


def _logits(
    head: Head, visible: Bool[Array, "Q C"] | None, soft_cap: float | None
) -> Float[Array, "Q C"]:
    """Of base 2: an exponential is one anyway, behind a product that is spared here."""
    product = _dot(head.q, head.keys(), 1)
    if soft_cap is None:
        logits = product * (head.scale * LOG2_E)
    else:
        logits = jnp.tanh(product * (head.scale / soft_cap)) * (soft_cap * LOG2_E)
    return logits if visible is None else jnp.where(visible, logits, MASKED)


def _spread(column: Float[Array, "Q lanes"], size: int) -> Float[Array, "Q size"]:
    """A column, equal in all lanes, so many lanes wide."""
    if size <= LANES:
        return column[:, :size]
    if size % LANES:
        return jnp.broadcast_to(column[:, :1], (column.shape[0], size))
    return jnp.concatenate([column] * (size // LANES), axis=1)


def _fold(x: Float[Array, "Q C"]) -> Float[Array, "Q lanes"]:
    """Lanes whose sum is the sum of x."""
    Q, C = x.shape
    if C % LANES:
        first = jax.lax.broadcasted_iota(jnp.int32, (Q, LANES), 1) == 0
        return jnp.where(first, jnp.sum(x, axis=1, keepdims=True), 0)
    return sum((x[:, i : i + LANES] for i in range(LANES, C, LANES)), x[:, :LANES])


def _dot(a: Float[Array, "X Y"], b: Float[Array, "..."], axis: int) -> Float[Array, "X Z"]:
    """A times b along b's axis, summed in float32; float32 operands are not rounded to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
