"""What the host's bookkeeping costs: planning a step, handing out blocks, hashing a prompt."""

import dataclasses
import statistics
import time
from collections.abc import Callable

from benchmarks.lengths import RequestLengths
from benchmarks.scripted import make_request, requests_of
from jpaged.batch import pack_batch, table_updates
from jpaged.blocks import BlockPool
from jpaged.buckets import Bucket
from jpaged.config import EngineConfig
from jpaged.plan import StepPlan
from jpaged.prefix_cache import PrefixCache, chain_digests, root_digest
from jpaged.scheduler import Scheduler
from jpaged_models import Phase

NUM_ROWS = 256
NUM_WAITING = 10_000
NUM_LONG = 40  # the first of them: more than are considered at once
NUM_HASHED = 100_000  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCost:
    """Medians; all `schedule_ms` are of steps that took turns."""

    schedule_ms: float  # `schedule()`, the plan included, with 256 decodes
    schedule_ahead_ms: float  # the same while the step before is in flight, as the engine does it
    pack_ms: float  # the plan as arrays, for one transfer
    schedule_queued_ms: float  # the same while 10,000 requests wait
    schedule_blocked_ms: float  # and while it is blocks, not rows, that they wait for
    commit_ms: float
    pairs_per_s: float  # blocks allocated and freed
    hash_ms: float  # a prompt of 100,000 tokens


def host_cost(*, block_size: int, repeats: int) -> HostCost:
    """Times each piece `repeats` times."""
    roomy = NUM_ROWS * (2 + (512 + 3 * repeats) // block_size)
    # A third more rows than run, and few blocks beyond those that they will hold.
    tight = NUM_ROWS * (1 + (512 + repeats) // block_size)
    schedulers = (
        _decoding(0, block_size, num_blocks=roomy, num_rows=NUM_ROWS),
        _decoding(NUM_WAITING, block_size, num_blocks=roomy, num_rows=NUM_ROWS),
        _decoding(NUM_WAITING, block_size, num_blocks=tight, num_rows=NUM_ROWS * 4 // 3),
    )
    schedules: tuple[list[float], ...] = ([], [], [])
    commits, ahead, packs = [], [], []
    for _ in range(repeats):
        for scheduler, seconds in zip(schedulers, schedules, strict=True):
            start = time.perf_counter()
            plan = scheduler.schedule()
            planned = time.perf_counter()
            assert plan is not None, "the rows decode for longer than this"
            assert len(plan.rows) == plan.num_decodes == NUM_ROWS, "nothing but 256 decodes"
            scheduler.commit(plan, [1] * NUM_ROWS)
            seconds.append(planned - start)
            commits.append(time.perf_counter() - planned)
        planning, packing = _time_ahead(schedulers[0], block_size)
        ahead.append(planning)
        packs.append(packing)
    pool = BlockPool(10_001, PrefixCache())
    token_ids = list(range(NUM_HASHED))
    root = root_digest(None)
    schedule, queued, blocked = (statistics.median(seconds) * 1e3 for seconds in schedules)
    return HostCost(
        schedule_ms=schedule,
        schedule_ahead_ms=statistics.median(ahead) * 1e3,
        pack_ms=statistics.median(packs) * 1e3,
        schedule_queued_ms=queued,
        schedule_blocked_ms=blocked,
        commit_ms=statistics.median(commits) * 1e3,
        pairs_per_s=10_000 / _median(lambda: pool.free(pool.allocate(10_000)), repeats),
        hash_ms=_median(lambda: chain_digests(root, token_ids, block_size), repeats) * 1e3,
    )


def _time_ahead(scheduler: Scheduler, block_size: int) -> tuple[float, float]:
    """Seconds of a plan that is made and packed while another is in flight; both end here."""
    first = scheduler.schedule()
    start = time.perf_counter()
    second = scheduler.schedule()
    planned = time.perf_counter()
    assert first is not None, "the rows decode for longer than this"
    assert second is not None, "and there is room for all of them"
    packing = _time_pack(second, block_size)
    for plan in (first, second):
        scheduler.commit(plan, [1] * NUM_ROWS)
    return planned - start, packing


def _time_pack(plan: StepPlan, block_size: int) -> float:
    bucket = Bucket(Phase.DECODE, NUM_ROWS, NUM_ROWS)
    start = time.perf_counter()
    pack_batch(
        plan,
        bucket,
        table_updates(plan),
        block_size=block_size,
        padding_row=len(plan.rows),
        eos_token_ids=(),
    )
    return time.perf_counter() - start


def _decoding(num_waiting: int, block_size: int, *, num_blocks: int, num_rows: int) -> Scheduler:
    """A scheduler in the middle of 256 answers, and requests behind them."""
    running = [
        RequestLengths(input_tokens=490 + index % block_size, output_tokens=3_000)
        for index in range(NUM_ROWS)
    ]
    scheduler = Scheduler(
        EngineConfig(
            block_size=block_size,
            num_blocks=num_blocks + 1,
            max_num_seqs=num_rows,
            max_num_batched_tokens=1 << 20,
            max_model_len=20_000,
        )
    )
    for request in requests_of(running):
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, [1] * NUM_ROWS)
    for index in range(num_waiting):
        # The first are so long that they find no room beside 256 rows, and begin like those.
        tail = [NUM_ROWS + index] * (15_500 if index < NUM_LONG else 100)
        prompt = [index] * 490 + tail if index < NUM_LONG else tail
        scheduler.add(make_request(NUM_ROWS + index, prompt, 10))
    return scheduler


def _median(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
