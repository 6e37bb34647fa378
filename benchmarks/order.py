"""First come first served against cache-aware admission: what is hit, and who waits how long.

Requests come while others run, and both orders see the same ones. Time is counted in steps.
"""

import collections
import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Callable

import numpy as np

from benchmarks.lengths import law_lengths
from benchmarks.replay import Prompt
from benchmarks.scripted import make_request
from jpaged.config import EngineConfig
from jpaged.requests import MAX_OVERTAKEN, Sequence
from jpaged.scheduler import Scheduler

NUM_PREFIXES = 64  # system prompts, the likeliest 64 times as likely as the last
PREFIX_LENGTHS = (128, 4096)  # tokens, evenly between their logarithms
NUM_ROWS = 256
BUDGET = 2048  # tokens a step; both are the defaults on an accelerator
CLASSES = ("short", "middle", "long")  # thirds of the prompts, by length
PATIENCE = {"first come": 0, "cache-aware": MAX_OVERTAKEN}


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come; `prompt` makes its tokens when it does."""

    time: float  # in any unit: it is stretched to steps
    num_tokens: int
    num_outputs: int
    prompt: Callable[[], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits:
    """Steps from arrival to the first token; 1 where the next step brings it."""

    mean: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """What one order made of the requests."""

    hit_rate: float  # of the tokens of sequences that started
    steps: int
    preemptions: int
    most_overtaken: int
    waits: dict[str, Waits]  # of all, and of each class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Both orders over the same arrivals."""

    load: float
    orders: dict[str, Replayed]


def shared_prompts(law: str, num_requests: int, *, seed: int) -> list[Arrival]:
    """Prompts of a law's lengths, each behind one of many system prompts, at random times."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(*PREFIX_LENGTHS, NUM_PREFIXES).astype(int).tolist()
    weights = 1 / np.arange(1, NUM_PREFIXES + 1)
    ranks = rng.choice(NUM_PREFIXES, num_requests, p=weights / weights.sum())
    prefixes = rng.permutation(NUM_PREFIXES)[ranks].tolist()
    times = np.cumsum(rng.exponential(size=num_requests)).tolist()
    arrivals = []
    for index, pair in enumerate(law_lengths(law, num_requests, seed=seed)):
        prefix, own = sizes[prefixes[index]], pair.input_tokens
        make = functools.partial(_tokens, [prefixes[index], NUM_PREFIXES + index], [prefix, own])
        arrivals.append(Arrival(times[index], prefix + own, pair.output_tokens, make))
    return arrivals


def trace_prompts(prompts: list[Prompt]) -> list[Arrival]:
    """A Mooncake trace's prompts at their own times."""
    return [Arrival(p.arrival_s, p.num_tokens, p.num_outputs, p.token_ids) for p in prompts]


def compare_orders(
    arrivals: list[Arrival], loads: list[float], *, num_slots: int, block_size: int
) -> tuple[int, list[Compared]]:
    """Both orders under each load; first, the steps that all requests take when none is late.

    Under a load of 1 the requests come in as many steps as they then took.
    """
    longest = max(arrival.num_tokens + arrival.num_outputs for arrival in arrivals)
    config = EngineConfig(
        block_size=block_size,
        num_blocks=num_slots // block_size + 1,  # the null block holds nothing
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=BUDGET,
        max_model_len=longest + 1,
    )
    num_steps = _replay(_spread(arrivals, steps=0), config, patience=0).steps
    compared = []
    for load in loads:
        timed = _spread(arrivals, steps=num_steps / load)
        orders = {name: _replay(timed, config, patience=p) for name, p in PATIENCE.items()}
        compared.append(Compared(load=load, orders=orders))
    return num_steps, compared


def _spread(arrivals: list[Arrival], *, steps: float) -> list[Arrival]:
    """The arrivals with their times stretched so that the last comes after so many steps."""
    stretch = steps / max(arrival.time for arrival in arrivals)
    return [dataclasses.replace(arrival, time=arrival.time * stretch) for arrival in arrivals]


def _replay(arrivals: list[Arrival], config: EngineConfig, *, patience: int) -> Replayed:
    """Runs the requests, each of which may be overtaken `patience` times."""
    scheduler = Scheduler(config)
    coming = collections.deque(sorted(arrivals, key=operator.attrgetter("time")))
    came: dict[Sequence, float] = {}  # when; of those without a token
    begun: set[Sequence] = set()
    waits: list[tuple[int, float]] = []  # tokens of the prompt, steps to the first token
    step = most_overtaken = 0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            step = max(step, math.ceil(coming[0].time))
        while coming and coming[0].time <= step:
            arrival = coming.popleft()
            request = make_request(len(coming), arrival.prompt(), arrival.num_outputs)
            request.sequences[0].patience = patience
            came[request.sequences[0]] = arrival.time
            scheduler.add(request)
        plan = scheduler.schedule()
        assert plan is not None, "somebody has work"
        step += 1
        for row in plan.rows:
            sequence = row.sequence
            if row.is_new and sequence not in begun:
                begun.add(sequence)
                most_overtaken = max(most_overtaken, patience - sequence.patience)
            if row.samples and sequence in came:
                waits.append((sequence.num_prompt_tokens, step - came.pop(sequence)))
        scheduler.commit(plan, [1] * len(plan.rows))
    counters = scheduler.counters
    return Replayed(
        hit_rate=counters.hit_tokens / counters.queried_tokens,
        steps=step,
        preemptions=counters.preemptions,
        most_overtaken=most_overtaken,
        waits=_by_class(waits),
    )


def _tokens(values: list[int], sizes: list[int]) -> list[int]:
    """So many tokens of each value."""
    return [token for pair in zip(values, sizes, strict=True) for token in [pair[0]] * pair[1]]


def _by_class(waits: list[tuple[int, float]]) -> dict[str, Waits]:
    waits = sorted(waits)
    third = -(-len(waits) // len(CLASSES))
    parts = {name: waits[i * third : (i + 1) * third] for i, name in enumerate(CLASSES)}
    return {
        name: Waits(
            mean=statistics.fmean(steps for _, steps in part),
            p99=float(np.quantile([steps for _, steps in part], 0.99)),
        )
        for name, part in {"all": waits, **parts}.items()
    }
