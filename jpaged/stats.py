"""What the engine holds and has done, in numbers."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.plan import StepPlan
    from jpaged.scheduler import Scheduler


@dataclasses.dataclass(slots=True)
class Counters:
    """Running totals, kept by the scheduler."""

    steps: int = 0
    preemptions: int = 0
    recoveries: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    queried_tokens: int = 0  # of sequences looked up in the prefix cache when they started
    hit_tokens: int = 0  # of these, those that were there
    copied_blocks: int = 0
    swapped_out_blocks: int = 0  # to host memory, with preempted sequences
    swapped_in_blocks: int = 0
    peak_blocks: int = 0
    held_tokens: int = 0  # tokens held after a step, summed over the steps
    held_slots: int = 0  # slots of the blocks that held them, likewise
    table_blocks: int = 0  # entries of the running sequences' tables, likewise
    cached_blocks: int = 0  # free blocks that could still be shared, likewise
    rows: int = 0  # of sequences, in all steps
    decode_rows: int = 0  # of these, those with one token
    prefill_rows: int = 0  # and those with more
    schedule_seconds: float = 0.0  # of the host, planning steps
    send_seconds: float = 0.0  # of the host, packing them and starting the device
    wait_seconds: float = 0.0  # of the host, with nothing to do before a step's tokens come
    commit_seconds: float = 0.0  # of the host, taking them in

    def add_step(self, plan: "StepPlan", block_size: int) -> None:
        """Counts a step that was run: what it computed, and what the pool then held."""
        self.preemptions += len(plan.preempted)
        self.queried_tokens += plan.num_queried
        self.hit_tokens += plan.num_hit
        self.computed_tokens += plan.num_tokens
        self.copied_blocks += len(plan.copies)
        self.swapped_out_blocks += len(plan.swap_outs)
        self.swapped_in_blocks += len(plan.swap_ins)
        self.rows += len(plan.rows)
        self.decode_rows += plan.num_decodes
        self.prefill_rows += plan.num_prefills
        self.peak_blocks = max(self.peak_blocks, plan.use.num_blocks)
        self.held_tokens += plan.use.num_tokens
        self.held_slots += plan.use.num_blocks * block_size
        self.table_blocks += plan.use.num_entries
        self.cached_blocks += plan.use.num_cached


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of one engine.

    `blocks_cached` of the `blocks_free` can still be shared. `blocks_swapped` are in host memory.
    `waste` is the share of allocated slots that hold no token, now; `mean_waste` weighs every step
    so far by the slots it held. `saving` is the share of blocks in the running sequences' tables
    that sharing saves, now; `mean_saving` weighs every step by the blocks in those tables.
    `hit_rate` is the share of tokens found in the prefix cache when their sequences started. All
    are 0 where nothing was held or started. `computed_tokens` counts what the steps ran, so it
    exceeds the tokens known by what was computed again after a preemption or a failed step, and by
    one for each sequence that ended while its next step was running.

    Of the host's time in steps, `schedule_seconds` went into plans, `send_seconds` into packing
    them and starting the device, `commit_seconds` into taking in tokens, and `wait_seconds` into
    waiting for the device, which computes meanwhile (and, with `async_scheduling`, all the time).
    """

    running: int
    waiting: int
    num_blocks: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    blocks_swapped: int
    peak_blocks: int
    tokens_held: int
    hit_rate: float
    saving: float
    mean_saving: float
    waste: float
    mean_waste: float
    steps: int
    preemptions: int
    recoveries: int
    prompt_tokens: int
    generated_tokens: int
    computed_tokens: int
    copied_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    compiles: int
    lazy_compiles: int
    schedule_seconds: float
    send_seconds: float
    wait_seconds: float
    commit_seconds: float


def collect_stats(scheduler: "Scheduler", *, compiles: int = 0, lazy_compiles: int = 0) -> Stats:
    """The scheduler's figures at this moment, and the runner's count of programs.

    `compiles` counts every program compiled since the start, `lazy_compiles` those compiled while
    requests were waiting for them.
    """
    counters = scheduler.counters
    pool = scheduler.pool
    tokens_held, block_size = scheduler.num_tokens_held, scheduler.config.block_size
    return Stats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        num_blocks=pool.num_blocks,
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_free=pool.num_free,
        blocks_swapped=scheduler.swapping.num_used,
        peak_blocks=counters.peak_blocks,
        tokens_held=tokens_held,
        hit_rate=share(counters.hit_tokens, counters.queried_tokens),
        saving=missing(pool.num_used, sum(len(s.block_ids) for s in scheduler.running)),
        mean_saving=missing(counters.held_slots // block_size, counters.table_blocks),
        waste=missing(tokens_held, pool.num_used * block_size),
        mean_waste=missing(counters.held_tokens, counters.held_slots),
        steps=counters.steps,
        preemptions=counters.preemptions,
        recoveries=counters.recoveries,
        prompt_tokens=counters.prompt_tokens,
        generated_tokens=counters.generated_tokens,
        computed_tokens=counters.computed_tokens,
        copied_blocks=counters.copied_blocks,
        swapped_out_blocks=counters.swapped_out_blocks,
        swapped_in_blocks=counters.swapped_in_blocks,
        compiles=compiles,
        lazy_compiles=lazy_compiles,
        schedule_seconds=counters.schedule_seconds,
        send_seconds=counters.send_seconds,
        wait_seconds=counters.wait_seconds,
        commit_seconds=counters.commit_seconds,
    )


def share(part: float, whole: float) -> float:
    """How much of `whole` the part is; 0 of nothing."""
    return part / whole if whole else 0.0


def missing(part: float, whole: float) -> float:
    """How much of `whole` the part lacks; 0 of nothing."""
    return 1.0 - part / whole if whole else 0.0
