"""The pytrees of a step. JAX also builds them around specs, so their shapes are for the reader."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int32


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
class DeviceState:
    """A row per running sequence; block tables change only by what a step's batch says."""

    block_tables: Int32[Array, "R M"]
    last_tokens: Int32[Array, " R"]
    sampling: SamplingRows
