"""Logits bent before anything is sampled from them, each row by its own parameters.

Definitions and order as in vLLM (`Sampler.apply_logits_processors`): tokens that are not allowed
and bad words are forbidden and `logit_bias` is added; then a repetition penalty divides positive
logits and multiplies negative ones of tokens that stand in the prompt or were generated
(Transformers' `RepetitionPenaltyLogitsProcessor`; Keskar et al., CTRL, 2019); then the frequency
penalty is taken off as often as a token was generated, and the presence penalty once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.sampling import FORBIDDEN, forbid
from jpaged.state import LogitShape, ShapeBatch, ShapeStart

# Read for rows that bend nothing: whatever else their row of the state held stays out of sight.
_NEUTRAL = LogitShape(0, False, 0.0, 0.0, 0.0, 1.0)  # pyright: ignore[reportArgumentType]


def zero_shape(num_rows: int, vocab_size: int) -> LogitShape:
    """A state that holds nothing."""
    row, table = (num_rows,), (num_rows, vocab_size)
    return LogitShape(
        counts=jnp.zeros(table, jnp.int32),
        in_prompt=jnp.zeros(table, jnp.bool),
        bias=jnp.zeros(table, jnp.float32),
        presence=jnp.zeros(row, jnp.float32),
        frequency=jnp.zeros(row, jnp.float32),
        repetition=jnp.ones(row, jnp.float32),
    )


def shape_logits(
    logits: Float[Array, "B V"], shape: LogitShape, batch: ShapeBatch
) -> Float[Array, "B V"]:
    """The logits to sample from; those of rows that bend nothing stay bit-equal."""
    rows = jax.tree.map(
        lambda leaf, neutral: leaf.at[batch.row_ids].get(mode="fill", fill_value=neutral),
        shape,
        _NEUTRAL,
    )
    shaped = _penalize(logits + rows.bias, rows)
    # Once more: no penalty may bring a token back.
    shaped = jnp.where(rows.bias > FORBIDDEN, shaped, FORBIDDEN)
    return forbid(shaped, batch.forbidden)


def count_tokens(
    shape: LogitShape, row_ids: Int32[Array, " B"], tokens: Int32[Array, " B"]
) -> LogitShape:
    """The state with one more of each row's token; row R is dropped."""
    return dataclasses.replace(shape, counts=shape.counts.at[row_ids, tokens].add(1, mode="drop"))


def start_row(shape: LogitShape, start: ShapeStart) -> LogitShape:
    """The state with a row's values entered, over whatever the row held before."""
    row, cleared = start.row, start.cleared_row

    def enter(leaf: Array, base: Array | int, ids: Array, values: Array | bool) -> Array:
        leaf = leaf.at[cleared].set(base, mode="drop")
        return leaf.at[row, ids].set(values, mode="drop")

    return LogitShape(
        counts=enter(shape.counts, 0, start.generated_ids, start.counts),
        in_prompt=enter(shape.in_prompt, False, start.prompt_ids, True),
        bias=enter(shape.bias, start.base[:, None], start.biased_ids, start.bias),
        presence=shape.presence.at[row].set(start.presence),
        frequency=shape.frequency.at[row].set(start.frequency),
        repetition=shape.repetition.at[row].set(start.repetition),
    )


def _penalize(logits: Float[Array, "B V"], rows: LogitShape) -> Float[Array, "B V"]:
    repetition = rows.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(rows.in_prompt | (rows.counts > 0), scaled, logits)
    logits -= rows.frequency[:, None] * rows.counts
    return logits - rows.presence[:, None] * (rows.counts > 0)
