"""A step plan as arrays: packed by the host into one vector, unpacked inside the jitted step."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, PyTree

from jpaged.buckets import Bucket
from jpaged.params import SamplingParams
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.state import SamplingRows, StepBatch

FROM_DEVICE = -1  # in place of a token that the device sampled itself and still holds
MAX_STOP_IDS = 16  # stop ids that min_tokens can hold back, a row


def batch_spec(bucket: Bucket, block_size: int) -> StepBatch:
    """The shapes and dtypes of a bucket's batch, in packing order."""
    T, B, U = bucket.num_tokens, bucket.num_rows, bucket.num_table_updates(block_size)

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    rows = sampling_spec(B)
    make: Any = StepBatch  # of specs here, of arrays elsewhere
    b = i32(B)
    return make(i32(T), i32(B + 1), b, b, i32(1), b, b, b, i32(U, 3), rows)


def sampling_spec(num_rows: int) -> SamplingRows:
    """The shapes and dtypes of so many rows' sampling parameters."""
    make: Any = SamplingRows
    i32 = jax.ShapeDtypeStruct((num_rows,), np.int32)
    f32 = jax.ShapeDtypeStruct((num_rows,), np.float32)
    stop_ids = jax.ShapeDtypeStruct((num_rows, MAX_STOP_IDS), np.int32)
    return make(
        seed_low=i32,
        seed_high=i32,
        index=i32,
        top_k=i32,
        first_stop=i32,
        stop_ids=stop_ids,
        temperature=f32,
        top_p=f32,
        min_p=f32,
    )


def packed_spec(spec: PyTree) -> jax.ShapeDtypeStruct:
    """The vector that arrays of these specs are packed into."""
    return jax.ShapeDtypeStruct((sum(leaf.size for leaf in jax.tree.leaves(spec)),), np.int32)


def host_zeros(spec: PyTree) -> Any:
    """Host arrays of these specs, to be filled and packed."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec)


def pack(arrays: PyTree) -> np.ndarray:
    """Host arrays of 4-byte words as one int32 vector."""
    return np.concatenate([leaf.reshape(-1).view(np.int32) for leaf in jax.tree.leaves(arrays)])


def unpack(packed: Int32[Array, " X"], spec: PyTree) -> Any:
    """The arrays of a packed vector; runs inside jit, where it costs static slices."""
    leaves, tree = jax.tree.flatten(spec)
    arrays, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        part = packed[start : start + size].reshape(leaf.shape)
        arrays.append(jax.lax.bitcast_convert_type(part, leaf.dtype))
        start += size
    return jax.tree.unflatten(tree, arrays)


def table_updates(plan: StepPlan) -> list[tuple[int, int, int]]:
    """The (row, column, block id) entries that the device's tables lack."""
    return [(row.row, column, block) for row in plan.rows for column, block in row.new_blocks]


def pack_batch(
    plan: StepPlan,
    bucket: Bucket,
    updates: list[tuple[int, int, int]],
    *,
    block_size: int,
    padding_row: int,
    eos_token_ids: tuple[int, ...],
) -> np.ndarray:
    """The plan as one int32 vector: one transfer to the device a step.

    `updates` are those of `table_updates` that are still to be made, as many as the bucket holds.
    """
    batch = host_zeros(batch_spec(bucket, block_size))
    batch.table_updates[:, 0] = padding_row
    for ids in (batch.row_ids, batch.sampled_row_ids, batch.new_row_ids):
        ids[:] = padding_row
    batch.new_rows.stop_ids[:] = -1
    batch.table_updates[: len(updates)] = np.reshape(updates, (-1, 3))
    token = 0
    last_tokens = {}  # of each row
    for i, scheduled in enumerate(plan.rows):
        end = token + scheduled.num_tokens
        batch.tokens[token:end] = _tokens(scheduled)
        token = end
        batch.query_starts[i + 1] = end
        batch.seq_lens[i] = scheduled.seq_len
        last_tokens[scheduled.row] = end - 1
        leads = scheduled.row if scheduled.forked is None else scheduled.forked
        batch.logit_tokens[i] = last_tokens[leads]
        batch.row_ids[i] = scheduled.row
        if scheduled.samples:
            batch.sampled_row_ids[i] = scheduled.row
        if scheduled.is_new:
            batch.new_row_ids[i] = scheduled.row
            _fill_sampling(batch.new_rows, i, scheduled, eos_token_ids)
    batch.query_starts[len(plan.rows) + 1 :] = token
    batch.num_decodes[0] = plan.num_decodes
    return pack(batch)


def _tokens(scheduled: ScheduledRow) -> list[int] | int:
    if scheduled.feeds_back:
        return FROM_DEVICE
    start = scheduled.start
    return scheduled.sequence.token_ids[start : start + scheduled.num_tokens]


def stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a sequence, which `min_tokens` holds back."""
    return (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids))


def _fill_sampling(
    rows: SamplingRows, i: int, scheduled: ScheduledRow, eos_token_ids: tuple[int, ...]
) -> None:
    sequence = scheduled.sequence
    request = sequence.request
    params = request.params
    seed = np.array([request.seed % 2**64], np.uint64).view(np.int32)  # little endian: low first
    rows.seed_low[i], rows.seed_high[i] = seed
    rows.index[i] = sequence.index
    rows.top_k[i] = params.top_k
    rows.temperature[i] = params.temperature
    rows.top_p[i] = params.top_p
    rows.min_p[i] = params.min_p
    if params.min_tokens:
        held_back = stop_ids(params, eos_token_ids)
        rows.first_stop[i] = sequence.num_prompt_tokens + params.min_tokens
        rows.stop_ids[i, : len(held_back)] = held_back
