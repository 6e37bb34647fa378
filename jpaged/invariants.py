"""The promises of the host side, checked; on in tests, off in production."""

import collections

from jpaged.blocks import NULL_BLOCK
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.prefix_cache import chain_digests, root_digest
from jpaged.requests import MAX_OVERTAKEN
from jpaged.scheduler import Scheduler
from jpaged.waiting import NUM_CONSIDERED


def check(scheduler: Scheduler, plan: StepPlan | None = None) -> None:
    """Raises AssertionError that names the first broken invariant, by its number in DESIGN.md.

    Call it between steps, or between `schedule` and `commit` with the plan that was made last.
    """
    _check_sequences(scheduler)
    _check_rows(scheduler)
    _check_blocks(scheduler)
    _check_contents(scheduler)
    _check_beams(scheduler)
    _check_tables(scheduler)
    _check_order(scheduler, plan)
    _check_swapped(scheduler)
    if plan is not None:
        _check_plan(scheduler, plan)
    if not scheduler.requests:
        _check_drained(scheduler)


def _check_blocks(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    free = pool.free_ids
    referenced = [block for block in range(pool.num_blocks) if pool.ref_counts[block] > 0]
    _require(len(set(free)) == len(free), f"1: a block is free twice: {free}")
    _require(NULL_BLOCK not in free and NULL_BLOCK not in referenced, "1: the null block is ours")
    _require(
        sorted([*free, *referenced]) == list(range(1, pool.num_blocks)),
        f"1: {len(free)} free + {len(referenced)} referenced blocks are not the whole pool, "
        f"which has {pool.num_blocks - 1}",
    )
    holders = collections.Counter(
        block for sequence in scheduler.running for block in sequence.block_ids
    )
    for block, count in enumerate(pool.ref_counts):
        _require(
            holders[block] == count,
            f"2: block {block} has count {count} and stands in {holders[block]} tables",
        )
    cached = {block for block in free if block in pool.cache}
    _require(pool.num_cached == len(cached), f"1: {pool.num_cached} cached blocks, not {cached}")
    _require(
        free[len(free) - len(cached) :] == tuple(b for b in free if b in cached),
        f"1: a cached block would be given out before a blank one: {free}",
    )


def _check_contents(scheduler: Scheduler) -> None:
    """Registered blocks, free ones too, stand for their tokens, and live tables hold those."""
    size, cache = scheduler.config.block_size, scheduler.pool.cache
    _require(len(cache.items()) == len(cache), "4: blocks and digests do not come in pairs")
    for digest, block in cache.items():
        entry = cache.entry_of(block)
        _require(
            entry is not None and chain_digests(entry.parent, entry.token_ids, size) == [digest],
            f"4: block {block} is not registered for the tokens of its digest",
        )
    for sequence in scheduler.running:
        root = root_digest(sequence.request.params.cache_salt)
        chain = chain_digests(root, sequence.token_ids, size)
        for index, block in enumerate(sequence.block_ids):
            digest = cache.digest_of(block)
            _require(
                digest is None or (index < len(chain) and chain[index] == digest),
                f"4: block {block} is registered for other tokens than those of its table's "
                f"column {index}",
            )


def _check_tables(scheduler: Scheduler) -> None:
    in_flight = {row.sequence for plan in scheduler.in_flight for row in plan.rows}
    for sequence in scheduler.running:
        num_tokens = sequence.num_computed_tokens
        expected = scheduler.config.blocks_for(num_tokens)
        _require(
            len(sequence.block_ids) == expected,
            f"5: {num_tokens} tokens need {expected} blocks, the table has {sequence.block_ids}",
        )
        _require(
            sequence in in_flight
            or (num_tokens < sequence.num_tokens) == (sequence.candidates is None),
            "6: a running sequence has no token left to compute, or a beam that has is waited for",
        )


def _check_order(scheduler: Scheduler, plan: StepPlan | None) -> None:
    for sequences in (scheduler.running, scheduler.waiting):
        order = [sequence.order for sequence in sequences]
        _require(order == sorted(set(order)), f"14: running or waiting out of order: {order}")
    rows, preempted = ((), ()) if plan is None else (plan.rows, plan.preempted)
    seq_lens = {row.sequence: row.seq_len for row in rows}
    partial = [s for s in scheduler.running if s.num_computed_tokens < s.num_all_tokens - 1]
    priorities = [sequence.request.priority for sequence in partial]
    _require(
        len(set(priorities)) == len(priorities),
        f"14: two sequences of one priority are in the middle of their prompts: {priorities}",
    )
    _require(
        all(0 <= sequence.patience <= MAX_OVERTAKEN for sequence in scheduler.waiting),
        f"14: a sequence was overtaken more than {MAX_OVERTAKEN} times",
    )
    lost = [sequence for sequence in preempted if sequence not in seq_lens]
    for row in rows:
        _require(
            all(row.sequence.order < sequence.order for sequence in lost),
            f"14: one that stands before {row.sequence.order} was preempted in its stead",
        )
        _require(
            not (_is_start(row) and scheduler.waiting)
            or row.sequence.request.priority <= scheduler.waiting.best_priority,
            f"14: one of a better priority than {row.sequence.order} waits while that starts",
        )


def _is_start(row: ScheduledRow) -> bool:
    """Whether the row's sequence waited before; of a beam that was forked one cannot tell."""
    is_beam = row.sequence.request.search is not None and row.sequence.num_output_tokens > 0
    return row.is_new and row.forked is None and not is_beam


def _check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    config = scheduler.config
    lengths = [row.num_tokens for row in plan.rows]
    forked = [row for row in plan.rows if row.forked is not None]
    _require(sum(lengths) > 0, f"6: a step of {lengths} makes no progress")
    _require(
        [row.num_tokens > 0 for row in plan.rows]
        == [True] * (len(lengths) - len(forked)) + [False] * len(forked),
        f"6: forks, and only they, have no token and stand last: {lengths}",
    )
    _require(plan.num_tokens == sum(lengths), f"6: num_tokens is {plan.num_tokens}")
    _require(
        plan.num_tokens <= config.max_num_batched_tokens,
        f"6: {plan.num_tokens} tokens exceed the budget of {config.max_num_batched_tokens}",
    )
    _require(len(lengths) <= config.max_num_seqs, f"6: {len(lengths)} rows are too many")
    _require(len({row.row for row in plan.rows}) == len(lengths), "6: a row stands twice")
    _require(plan.num_decodes == lengths.count(1), f"6: num_decodes is {plan.num_decodes}")
    _require(set(lengths[: plan.num_decodes]) <= {1}, f"6: rows out of order: {lengths}")
    planned = {row.sequence for row in plan.rows}
    unpaused = [s for s in scheduler.running if s.candidates is None and not s.ends_in_flight]
    _require(planned.issuperset(unpaused), "6: a running sequence gets no token")
    for row in plan.rows:
        sequence = row.sequence
        if sequence.finished:  # aborted since
            continue
        _require(sequence.row == row.row, f"6: the sequence moved from row {row.row}")
        _require(sequence.num_computed_tokens == row.seq_len, f"6: the row ends at {row.seq_len}")
        is_sampled = row.samples and sequence.request.search is None
        num_before = sequence.num_all_tokens - is_sampled
        _require(row.samples == (row.seq_len == num_before), "6: wrong about sampling")
        _require(
            num_before < sequence.max_num_tokens or sequence.request.search is not None,
            f"6: a sequence of {num_before} tokens gets one that it cannot keep",
        )
        _require(
            set(row.new_blocks) <= set(enumerate(sequence.block_ids)),
            f"5: the new blocks {row.new_blocks} are not those of {sequence.block_ids}",
        )
    _check_writes(scheduler, plan)


def _check_writes(scheduler: Scheduler, plan: StepPlan) -> None:
    """No block is written that anybody shared, or could hit, before this step."""
    size, cache = scheduler.config.block_size, scheduler.pool.cache
    old_holders = collections.Counter(
        block
        for row in plan.rows
        if not row.is_new and not row.sequence.finished
        for block in row.sequence.block_ids
    )
    planned = {row.sequence for row in plan.rows}
    for sequence in scheduler.running:
        if sequence not in planned:
            old_holders.update(sequence.block_ids)
    for row in plan.rows:
        sequence = row.sequence
        if not row.num_tokens or sequence.finished:
            continue
        for block in sequence.block_ids[row.start // size : (row.seq_len - 1) // size + 1]:
            others = old_holders[block] - (not row.is_new)
            _require(others == 0, f"3: block {block} is written, and {others} others held it")
            _require(cache.is_unsettled(block), f"3: block {block} is written and registered")
    written = [destination for _, destination in (*plan.copies, *plan.swap_ins)]
    _require(len(set(written)) == len(written), f"3: a block is copied to twice: {written}")


def _check_swapped(scheduler: Scheduler) -> None:
    swapping = scheduler.swapping
    used = [space_id for stored in swapping.stored.values() for space_id in stored.space_ids]
    _require(
        sorted([*used, *swapping.free_ids]) == list(range(swapping.num_blocks)),
        f"1: {used} used and {swapping.free_ids} free host blocks are not all of them once",
    )
    _require(
        set(swapping.stored) <= set(scheduler.waiting),
        "8: one that does not wait is in host memory",
    )
    for sequence, stored in swapping.stored.items():
        expected = scheduler.config.blocks_for(stored.num_tokens)
        _require(
            len(stored.space_ids) == expected and stored.num_tokens <= sequence.num_tokens,
            f"5: {stored} is not what a sequence of {sequence.num_tokens} tokens can have left",
        )


def _check_rows(scheduler: Scheduler) -> None:
    rows = [sequence.row for sequence in scheduler.running if sequence.row is not None]
    _require(len(rows) == len(scheduler.running), "6: a running sequence has no row")
    _require(
        sorted([*rows, *scheduler.free_rows]) == list(range(scheduler.config.max_num_seqs)),
        f"6: rows {rows} in use and {scheduler.free_rows} free are not all rows once",
    )
    _require(
        len(rows) <= scheduler.config.max_num_batched_tokens,
        f"6: {len(rows)} sequences run, more than a step has tokens for",
    )


def _check_sequences(scheduler: Scheduler) -> None:
    queued = [*scheduler.running, *scheduler.waiting]
    running = set(scheduler.running)
    unfinished = {
        sequence
        for request in scheduler.requests.values()
        for sequence in request.sequences
        if not sequence.finished
    }
    _require(unfinished == set(queued), "8: the queues do not hold what is unfinished")
    _require(len(queued) == len(unfinished), "8: a sequence runs and waits")
    sampling = collections.Counter(
        row.sequence
        for plan in scheduler.in_flight
        for row in plan.rows
        if row.samples and row.sequence.request.search is None
    )
    for sequence in unfinished:
        _require(
            sequence.num_in_flight == sampling[sequence],
            f"8: {sampling[sequence]} tokens are in flight, not {sequence.num_in_flight}",
        )
    front, num_waiting = scheduler.waiting.front, scheduler.num_waiting
    _require(
        (len(front), num_waiting) == (min(NUM_CONSIDERED, num_waiting), len(queued) - len(running)),
        f"8: {len(front)} of {num_waiting} waiting sequences stand in front",
    )
    for name, request in scheduler.requests.items():
        _require(not request.finished, f"8: request {name!r} is finished and still known")
        for sequence in request.sequences:
            _require(
                sequence in running
                or (
                    sequence.row is None
                    and not sequence.block_ids
                    and not sequence.num_computed_tokens
                    and not sequence.last_token_on_device
                ),
                f"8: a sequence of {name!r} holds something and does not run: {sequence}",
            )


def _check_beams(scheduler: Scheduler) -> None:
    """The sequences of a search are its live beams, and not all of them wait for one another."""
    for name, request in scheduler.requests.items():
        search = request.search
        if search is None:
            continue
        for sequence, beam in zip(request.sequences, search.live, strict=False):
            _require(
                sequence.output_token_ids == beam.token_ids,
                f"15: a sequence of {name!r} is not its beam: {sequence}",
            )
        live = request.sequences[: len(search.live)]
        _require(
            any(sequence.candidates is None and not sequence.finished for sequence in live),
            f"15: all beams of {name!r} wait for one another",
        )


def _check_drained(scheduler: Scheduler) -> None:
    _require(not scheduler.running and not scheduler.waiting, "8: a queue outlives its requests")
    _require(scheduler.pool.num_used == 0, f"8: {scheduler.pool.num_used} blocks are still held")
    _require(not scheduler.in_flight, "8: a plan outlives the requests")


def _require(condition: bool, message: str) -> None:
    if not condition:  # not `assert`: the check must also work under python -O
        raise AssertionError(f"invariant {message}")
