"""Requests whose answers are known beforehand: the scheduler runs them without a device."""

import itertools
from collections.abc import Iterable, Iterator

from benchmarks.lengths import RequestLengths
from jpaged.config import EngineConfig
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.requests import Request
from jpaged.scheduler import Scheduler

QUEUED = 64  # requests that wait while a trace is fed: enough that the queue is never empty


def make_request(index: int, prompt: list[int], num_outputs: int, *, n: int = 1) -> Request:
    """A request that ends after `num_outputs` tokens."""
    return Request(
        request_id=str(index),
        prompt=None,
        prompt_token_ids=prompt,
        params=SamplingParams(n=n, max_tokens=num_outputs, ignore_eos=True, detokenize=False),
        seed=index,
    )


def requests_of(lengths: Iterable[RequestLengths], *, n: int = 1) -> Iterator[Request]:
    """A request for each pair of lengths, made when it is asked for; prompts share no block."""
    for index, pair in enumerate(lengths):
        prompt = list(itertools.repeat(index, pair.input_tokens))
        yield make_request(index, prompt, pair.output_tokens, n=n)


def scheduler_for(
    lengths: list[RequestLengths], *, num_slots: int, block_size: int, caching: bool
) -> Scheduler:
    """A scheduler that memory alone limits: any number of rows, whole prompts in one step."""
    longest = max(pair.input_tokens + pair.output_tokens for pair in lengths)
    return Scheduler(
        EngineConfig(
            block_size=block_size,
            num_blocks=num_slots // block_size + 1,  # the null block holds nothing
            max_num_seqs=num_slots // block_size,
            max_num_batched_tokens=num_slots + num_slots // block_size,
            max_model_len=longest + 1,
            enable_prefix_caching=caching,
        )
    )


def run_saturated(scheduler: Scheduler, requests: Iterable[Request]) -> Iterator[StepPlan]:
    """Every step's plan, before it is committed, with some requests waiting until none are left.

    What is sampled depends on the sequence and its length, so siblings differ.
    """
    for plan in saturated_plans(scheduler, requests):
        yield plan
        scheduler.commit(plan, [row.sequence.index + row.seq_len for row in plan.rows])


def saturated_plans(scheduler: Scheduler, requests: Iterable[Request]) -> Iterator[StepPlan]:
    """The same; whoever takes a plan commits it."""
    requests = iter(requests)
    while True:
        for request in itertools.islice(requests, max(0, QUEUED - scheduler.num_waiting)):
            scheduler.add(request)
        plan = scheduler.schedule()
        if plan is None:
            return
        yield plan
