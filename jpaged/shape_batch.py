"""What bends the logits, as packed vectors: one beside each step's batch, some for each new row.

A row's counts and biases are rebuilt from its sequence whenever it starts, so that they survive
preemption, forks and failed steps; after that the device counts the tokens it samples itself.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jpaged.bad_words import always_forbidden, forbidden_next
from jpaged.batch import host_zeros, pack
from jpaged.buckets import Bucket
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.requests import Request
from jpaged.sampling import FORBIDDEN
from jpaged.state import ShapeBatch, ShapeStart

MAX_FORBIDDEN = 32  # tokens that bad words can forbid in one step, a row
MAX_ENTRIES = 1024  # token ids of each kind in one start


def shape_batch_spec(bucket: Bucket) -> ShapeBatch:
    """The shapes and dtypes of what stands beside a bucket's batch."""
    B = bucket.num_rows
    make: Any = ShapeBatch  # of specs here, of arrays elsewhere
    return make(
        row_ids=jax.ShapeDtypeStruct((B,), np.int32),
        forbidden=jax.ShapeDtypeStruct((B, MAX_FORBIDDEN), np.int32),
    )


def shape_start_spec() -> ShapeStart:
    """The shapes and dtypes of a row's start."""
    make: Any = ShapeStart
    one_int, one_float = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (np.int32, np.float32))
    ints, floats = (jax.ShapeDtypeStruct((MAX_ENTRIES,), d) for d in (np.int32, np.float32))
    return make(
        row=one_int,
        cleared_row=one_int,
        base=one_float,
        presence=one_float,
        frequency=one_float,
        repetition=one_float,
        prompt_ids=ints,
        generated_ids=ints,
        counts=ints,
        biased_ids=ints,
        bias=floats,
    )


def shaping_rows(plan: StepPlan) -> list[ScheduledRow]:
    """The rows whose logits are bent."""
    return [row for row in plan.rows if row.sequence.request.params.shapes_logits]


def pack_shape_batch(plan: StepPlan, bucket: Bucket, *, padding_row: int) -> np.ndarray:
    """The rows that bend their logits in this step, and what longer bad words forbid in it."""
    batch = host_zeros(shape_batch_spec(bucket))
    batch.row_ids[:] = padding_row
    batch.forbidden[:] = -1
    for i, scheduled in enumerate(plan.rows):
        request = scheduled.sequence.request
        if not request.params.shapes_logits:
            continue
        batch.row_ids[i] = scheduled.row
        if scheduled.samples and request.bad_word_ids:
            token_ids = forbidden_next(request.bad_word_ids, scheduled.sequence.token_ids)
            assert len(token_ids) <= MAX_FORBIDDEN, "requests that could need more are refused"
            batch.forbidden[i, : len(token_ids)] = list(token_ids)
    return pack(batch)


def pack_shape_starts(
    scheduled: ScheduledRow, *, padding_row: int, vocab_size: int
) -> Iterator[np.ndarray]:
    """As many vectors as a row's history and biases take, at least one."""
    sequence = scheduled.sequence
    params = sequence.request.params
    prompt_ids: list[int] = []
    counts: Counter[int] = Counter()
    if params.penalizes:
        prompt_ids = list(set(sequence.request.prompt_token_ids))
        counts = Counter(sequence.output_token_ids)
    biases = _biases(sequence.request)
    longest = max(len(prompt_ids), len(counts), len(biases), 1)
    for first in range(0, longest, MAX_ENTRIES):
        entries = slice(first, first + MAX_ENTRIES)
        start = host_zeros(shape_start_spec())
        start.row[0] = scheduled.row
        start.cleared_row[0] = padding_row if first else scheduled.row
        start.base[0] = 0.0 if params.allowed_token_ids is None else FORBIDDEN
        start.presence[0] = params.presence_penalty
        start.frequency[0] = params.frequency_penalty
        start.repetition[0] = params.repetition_penalty
        for ids in (start.prompt_ids, start.generated_ids, start.biased_ids):
            ids[:] = vocab_size
        _fill(start.prompt_ids, prompt_ids[entries])
        _fill(start.generated_ids, list(counts)[entries])
        _fill(start.counts, list(counts.values())[entries])
        _fill(start.biased_ids, list(biases)[entries])
        _fill(start.bias, list(biases.values())[entries])
        yield pack(start)


def _biases(request: Request) -> dict[int, float]:
    """The bias of each token that differs from the row's base."""
    params = request.params
    allowed, biases = params.allowed_token_ids, dict(params.logit_bias or {})
    if allowed is not None:
        biases = {token: biases.get(token, 0.0) for token in allowed}
    return biases | dict.fromkeys(always_forbidden(request.bad_word_ids), FORBIDDEN)


def _fill(array: np.ndarray, values: list) -> None:
    array[: len(values)] = values
