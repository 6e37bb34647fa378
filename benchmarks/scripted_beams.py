"""Beams whose every candidate is known beforehand: it depends on the seed and all tokens before."""

import random
from collections.abc import Sequence as SequenceOf

from jpaged.beam_sequences import take_candidates
from jpaged.beams import BeamSearch, BeamSearchParams, Candidates, start_search
from jpaged.plan import StepPlan
from jpaged.requests import Request, Sequence
from jpaged.scheduler import Scheduler


def make_beam_request(
    request_id: str,
    prompt: list[int],
    params: BeamSearchParams,
    *,
    seed: int,
    max_model_len: int,
    eos_token_ids: SequenceOf[int] = (),
    priority: int = 0,
) -> Request:
    """A request whose search has not begun."""
    return Request(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt,
        params=params.sampling_params,
        seed=seed,
        priority=priority,
        search=start_search(
            params,
            num_prompt_tokens=len(prompt),
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
        ),
    )


def advance_beams(scheduler: Scheduler, plan: StepPlan, *, num_tokens: int) -> list[Sequence]:
    """What the engine does with beams after a commit; the sequences of those that ended.

    The vocabulary has `num_tokens` tokens.
    """
    candidates = [
        scripted_candidates(row.sequence.request, row.sequence.token_ids, num_tokens)
        if row.samples and row.sequence.request.search is not None
        else None
        for row in plan.rows
    ]
    ended = []
    for request in take_candidates(plan, candidates):
        ended += scheduler.advance(request)
    return ended


def scripted_candidates(
    request: Request, token_ids: SequenceOf[int], num_tokens: int
) -> Candidates:
    """Every token, likeliest first; of two histories no two are equally likely.

    With an odd seed the first is likelier by more and more, so that beams part at once and all go
    on; else their common past is never long gone.
    """
    rng = random.Random(hash((request.seed, *token_ids)))
    logprobs = sorted((-rng.expovariate(1.0) for _ in range(num_tokens)), reverse=True)
    if request.seed % 2:
        gap = 9.0 * (len(token_ids) - len(request.prompt_token_ids))
        logprobs = [logprobs[0], *(logprob - gap for logprob in logprobs[1:])]
    order = rng.sample(range(num_tokens), num_tokens)
    return list(zip(order, logprobs, strict=True))


def scripted_search(request: Request, *, num_tokens: int) -> BeamSearch:
    """The request's search at its end, when nobody disturbs it."""
    search = request.search
    assert search is not None, "somebody searches"
    prompt = request.prompt_token_ids
    search = BeamSearch(params=search.params, end_ids=search.end_ids, max_tokens=search.max_tokens)
    while not search.over:
        search = search.advance(
            [
                scripted_candidates(request, [*prompt, *beam.token_ids], num_tokens)
                for beam in search.live
            ]
        )
    return search
