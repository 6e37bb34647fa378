"""The pytrees of a step. JAX also builds them around specs, so their shapes are for the reader."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """What sampling needs to know about each row. Field order is the packing order."""

    seed_low: Int32[Array, " R"]
    seed_high: Int32[Array, " R"]
    index: Int32[Array, " R"]  # of the sequence in its request
    top_k: Int32[Array, " R"]  # 0: all
    first_stop: Int32[Array, " R"]  # the position from which stop ids are allowed (min_tokens)
    stop_ids: Int32[Array, "R E"]  # padded with -1
    temperature: Float[Array, " R"]  # 0: greedy
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """One step's ragged batch. Row ids of padding are R, so that their updates are dropped."""

    tokens: Int32[Array, " T"]
    query_starts: Int32[Array, "B+1"]
    seq_lens: Int32[Array, " B"]
    logit_tokens: Int32[Array, " B"]  # the token from whose logits the row samples
    num_decodes: Int32[Array, " 1"]
    row_ids: Int32[Array, " B"]
    sampled_row_ids: Int32[Array, " B"]  # the row where it samples, else R
    new_row_ids: Int32[Array, " B"]  # the row where it starts in this step, else R
    table_updates: Int32[Array, "U 3"]  # row, column, block id
    new_rows: SamplingRows  # of length B, read where new_row_ids names a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done before a step: the first `num_copies` block copies, and table entries."""

    num_copies: Int32[Array, " 1"]
    copies: Int32[Array, "R 2"]  # source, destination
    table_updates: Int32[Array, "U 3"]  # row, column, block id; row R is padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """A row per running sequence; block tables change only by what a step's batch says."""

    block_tables: Int32[Array, "R M"]
    last_tokens: Int32[Array, " R"]
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitShape:
    """What bends each row's logits; exists once a request needs it. Other rows are never read."""

    counts: Int32[Array, "R V"]  # of generated tokens
    in_prompt: Bool[Array, "R V"]
    bias: Float[Array, "R V"]  # FORBIDDEN where a token must never come
    presence: Float[Array, " R"]
    frequency: Float[Array, " R"]
    repetition: Float[Array, " R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShapeBatch:
    """What a step's batch has beside it when some of its rows have their logits bent."""

    row_ids: Int32[Array, " B"]  # the row where it does, else R
    forbidden: Int32[Array, "B E"]  # in this step alone; padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShapeStart:
    """A row's history and biases, as it starts; what has no room follows in further ones."""

    row: Int32[Array, " 1"]
    cleared_row: Int32[Array, " 1"]  # the row in its first one, else R
    base: Float[Array, " 1"]  # bias of all tokens that have none below
    presence: Float[Array, " 1"]
    frequency: Float[Array, " 1"]
    repetition: Float[Array, " 1"]
    prompt_ids: Int32[Array, " X"]  # padded with V, as the other ids
    generated_ids: Int32[Array, " X"]
    counts: Int32[Array, " X"]
    biased_ids: Int32[Array, " X"]
    bias: Float[Array, " X"]
