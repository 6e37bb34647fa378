"""What a saturated pool of blocks holds: waste, sequences at once, blocks that siblings share."""

import dataclasses

from benchmarks.contiguous import Shares
from benchmarks.lengths import RequestLengths
from benchmarks.scripted import requests_of, run_saturated, scheduler_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saturated:
    """Averages over the steps in which requests waited, each step counting the same."""

    shares: Shares
    waste: float  # of the allocated slots
    theory: float  # 7.5 / (mean resident tokens + 7.5) with blocks of 16
    resident_tokens: float  # of a running sequence
    preemptions: int
    steps: int


def saturate(lengths: list[RequestLengths], *, num_slots: int, block_size: int) -> Saturated:
    """Runs all of `lengths` through the scheduler, without the prefix cache.

    The first requests all begin at once, so the averages begin when as many have ended as ran
    then, and end when the last has begun.
    """
    scheduler = scheduler_for(lengths, num_slots=num_slots, block_size=block_size, caching=False)
    held = slots = num_running = num_steps = num_begun = first = 0
    for plan in run_saturated(scheduler, requests_of(lengths)):
        num_begun += sum(row.is_new and not row.sequence.num_output_tokens for row in plan.rows)
        first = first or len(plan.rows)
        if num_begun == len(lengths):
            break
        if num_begun - len(plan.rows) < first:
            continue
        held += plan.use.num_tokens
        slots += plan.use.num_blocks * block_size
        num_running += len(plan.rows)
        num_steps += 1
    if not num_steps:
        raise ValueError(
            f"{len(lengths)} requests do not keep {num_slots} slots busy; give more requests"
        )
    resident = held / num_running
    empty = (block_size - 1) / 2  # a last block holds 1 to block_size tokens, each as often
    total = num_steps * num_slots
    return Saturated(
        shares=Shares(
            effective=held / total,
            reserved=0.0,
            internal=(slots - held) / total,
            external=1 - slots / total,
            running=num_running / num_steps,
        ),
        waste=1 - held / slots,
        theory=empty / (resident + empty),
        resident_tokens=resident,
        preemptions=scheduler.counters.preemptions,
        steps=num_steps,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """The share of blocks that siblings save, over all steps from the first to the last."""

    n: int
    measured: float
    theory: float
    copied_blocks: int
    preemptions: int


def save(lengths: list[RequestLengths], n: int, *, num_slots: int, block_size: int) -> Saving:
    """Runs `n` answers to each prompt, all as long as the trace's own.

    The prefix cache is on, so that a sibling that was preempted shares its prompt again. In theory
    the whole blocks of a prompt are shared until its answers end, and nothing else is.
    """
    scheduler = scheduler_for(lengths, num_slots=num_slots, block_size=block_size, caching=True)
    logical = physical = 0
    for plan in run_saturated(scheduler, requests_of(lengths, n=n)):
        logical += sum(len(row.sequence.block_ids) for row in plan.rows)
        physical += scheduler.pool.num_used
    shared = whole = 0
    for pair in lengths:
        shared += pair.input_tokens // block_size * pair.output_tokens
        whole += sum(
            -(-num_tokens // block_size)
            for num_tokens in range(pair.input_tokens, pair.input_tokens + pair.output_tokens)
        )
    return Saving(
        n=n,
        measured=1 - physical / logical,
        theory=(n - 1) * shared / (n * whole),
        copied_blocks=scheduler.counters.copied_blocks,
        preemptions=scheduler.counters.preemptions,
    )
