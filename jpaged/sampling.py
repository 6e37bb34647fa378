"""Sampling on the device: one token a row, each row by its own parameters, inside the step.

Order as in vLLM: what `jpaged.shaping` does, then temperature, min_p, top_k, top_p over what is
left. All three filters are thresholds on the logits, found exactly by bisection on the ordered
bits of a float: never a sort of the vocabulary, and no value of k or p in a shape. Ties at a
threshold all stay.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.state import SamplingRows

FORBIDDEN = -1e30  # finite: with -inf, a row that has nothing left becomes NaN
_CHUNK = 128


class TopLogprobs(NamedTuple):
    """Log-probabilities of the model itself, before penalties, temperature and filters."""

    sampled: Float[Array, " B"]
    rank: Int32[Array, " B"]  # of the sampled token, 1 is the likeliest
    top: Float[Array, "B E"]
    top_ids: Int32[Array, "B E"]


def sample(
    logits: Float[Array, "B V"], rows: SamplingRows, positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """The token of each row at its position; rows of temperature 0 take the likeliest.

    A batch whose rows are all greedy draws no noise, one without filters skips them.
    """
    early = positions < rows.first_stop
    logits = jax.lax.cond(jnp.any(early), _forbid_stops, lambda x, *_: x, logits, rows, early)
    greedy = argmax(logits)
    drawn = jax.lax.cond(
        jnp.any(rows.temperature > 0), _draw, lambda *_: greedy, logits, rows, positions
    )
    return jnp.where(rows.temperature > 0, drawn, greedy)


def forbid(logits: Float[Array, "B V"], ids: Int32[Array, "B E"]) -> Float[Array, "B V"]:
    """Logits with each row's own ids forbidden; -1 is padding."""
    B, V = logits.shape
    ids = jnp.where(ids >= 0, ids, V)
    return logits.at[jnp.arange(B)[:, None], ids].set(FORBIDDEN, mode="drop")


def argmax(x: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """The first of the highest values in each row, by chunks.

    XLA's own on a CPU is a scalar loop on one core: a third of the vocabulary's product.
    """
    B, V = x.shape
    chunks = -(-V // _CHUNK)
    x = jnp.pad(x, [(0, 0), (0, chunks * _CHUNK - V)], constant_values=-jnp.inf)
    x = x.reshape(B, chunks, _CHUNK)
    best = jnp.argmax(jnp.max(x, axis=-1), axis=-1)
    chunk = jnp.take_along_axis(x, best[:, None, None], axis=1)[:, 0]
    return (best * _CHUNK + jnp.argmax(chunk, axis=-1)).astype(jnp.int32)


def top_logprobs(
    logits: Float[Array, "B V"], tokens: Int32[Array, " B"], *, num_top: int
) -> TopLogprobs:
    """The sampled token's log-probability and rank, and the `num_top` likeliest tokens."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    sampled = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > sampled, axis=-1, dtype=jnp.int32)
    top, top_ids = jax.lax.top_k(logprobs, min(num_top, logits.shape[-1]))
    return TopLogprobs(sampled[:, 0], rank, top, top_ids.astype(jnp.int32))


def noise(
    rows: SamplingRows, positions: Int32[Array, " B"], *, vocab_size: int
) -> Float[Array, "B V"]:
    """Gumbel noise that depends on (seed, sequence index, position) alone.

    Threefry 2x32 (Salmon et al., SC 2011): whatever runs beside a row leaves its noise bit-equal.
    """

    def draw(low: Array, high: Array, index: Array, position: Array) -> Float[Array, " V"]:
        key = jax.random.key(0, impl="threefry2x32")
        for word in (low, high, index, position):
            key = jax.random.fold_in(key, word.astype(jnp.uint32))
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(draw)(rows.seed_low, rows.seed_high, rows.index, positions)


def filter_logits(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """Logits over temperature, with all that min_p, top_k and top_p drop forbidden."""
    V = logits.shape[-1]
    high = jnp.max(logits, axis=-1, keepdims=True)
    # log(0) = -inf keeps everything; the likeliest token always stays.
    logits = jnp.where(logits >= high + jnp.log(rows.min_p)[:, None], logits, FORBIDDEN)

    def by_count(logits: Array) -> Array:
        wanted = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, V), V)
        return _keep_top(logits, jnp.ones_like(logits), wanted.astype(jnp.float32))

    logits = jax.lax.cond(jnp.any(rows.top_k > 0), by_count, lambda x: x, logits)

    def by_mass(logits: Array) -> Array:
        mass = jnp.where(logits > FORBIDDEN, jnp.exp(logits - high), 0)
        wanted = rows.top_p * jnp.sum(mass, axis=-1)
        kept = _keep_top(logits, mass, wanted)
        return jnp.where(rows.top_p[:, None] < 1, kept, logits)

    return jax.lax.cond(jnp.any(rows.top_p < 1), by_mass, lambda x: x, logits)


def _forbid_stops(
    logits: Float[Array, "B V"], rows: SamplingRows, early: Array
) -> Float[Array, "B V"]:
    return forbid(logits, jnp.where(early[:, None], rows.stop_ids, -1))


def _draw(
    logits: Float[Array, "B V"], rows: SamplingRows, positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """A draw from each row's distribution by the Gumbel-max trick."""
    safe = jnp.where(rows.temperature > 0, rows.temperature, 1)  # greedy rows are not read
    logits = logits / safe[:, None]
    filtered = (rows.min_p > 0) | (rows.top_k > 0) | (rows.top_p < 1)
    logits = jax.lax.cond(jnp.any(filtered), filter_logits, lambda x, _: x, logits, rows)
    gumbel = noise(rows, positions, vocab_size=logits.shape[-1])
    return argmax(logits + gumbel)


def _ordered_bits(x: Float[Array, "B V"]) -> Int32[Array, "B V"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _keep_top(
    logits: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    wanted: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """Logits of the smallest top set whose weights sum to at least `wanted`; the rest forbidden.

    Bisects for the highest threshold that still keeps enough, 32 masked sums at most.
    """

    def weight_above(threshold: Int32[Array, " B"]) -> Float[Array, " B"]:
        # The bits are taken anew each time: they cost less than a copy of the logits to keep them.
        return jnp.sum(jnp.where(_ordered_bits(logits) >= threshold[:, None], weights, 0), axis=-1)

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low keeps enough; nothing above high does
        # (low + high + 1) // 2 without overflow: the ends are far apart.
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        enough = weight_above(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    ordered = _ordered_bits(logits)
    bounds = (jnp.min(ordered, axis=-1), jnp.max(ordered, axis=-1))
    low, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), narrow, bounds)
    return jnp.where(ordered >= low[:, None], logits, FORBIDDEN)
