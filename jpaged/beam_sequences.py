"""The sequences of a request that follow its beam search: forked, given up, and ended.

A search (`jpaged.beams`) goes on by one assignment, and the sequences are made from it: whatever
comes in between, `restore` finds them as they should be.
"""

from collections.abc import Sequence as SequenceOf

from jpaged.beams import Beam, BeamSearch, Candidates
from jpaged.blocks import BlockPool
from jpaged.plan import StepPlan
from jpaged.requests import Request, Sequence


def take_candidates(
    plan: StepPlan, candidates: SequenceOf[Candidates | None] | None
) -> list[Request]:
    """Hands beams their candidates; the requests of which no live beam lacks any now.

    `candidates` has one entry for each row of the plan, None where it samples for no search.
    """
    requests: dict[str, Request] = {}
    for row, found in zip(plan.rows, candidates or (), strict=False):
        if found is not None and not row.sequence.finished:
            row.sequence.candidates = found
            requests[row.sequence.request.request_id] = row.sequence.request
    return [
        request
        for request in requests.values()
        if all(sequence.candidates is not None for sequence in _live_sequences(request))
    ]


def advance(request: Request) -> int:
    """Takes the request's search one token on; how many beams got one. `follow` comes next."""
    candidates = [sequence.candidates or [] for sequence in _live_sequences(request)]
    request.search = _search_of(request).advance(candidates)
    return len(candidates)


def follow(request: Request, pool: BlockPool) -> None:
    """Makes the sequences what the search says; what no beam needs any more is freed.

    One that goes on gets its token. One whose place another beam takes shares all that the other
    holds, a half full block too, of which the first to write there gets a copy.
    """
    search = _search_of(request)
    if search.over:
        _end(request, search)
        return
    for place, parent in enumerate(search.parents):
        if parent != place:
            _take_over(request.sequences[place], request.sequences[parent], pool)
    for sequence, beam in zip(request.sequences, search.live, strict=True):
        sequence.token_ids.append(beam.token)
        sequence.candidates = None


def restore(request: Request) -> None:
    """Makes the sequences anew from the search; nothing on the device is theirs any more.

    A request that was ended from outside stays so.
    """
    search = _search_of(request)
    if search.over:
        _end(request, search)
    elif not request.finished:
        first = search.live[0]
        for sequence, beam in zip(request.sequences, search.live, strict=False):
            _write(sequence, beam)
        for sequence in request.sequences[len(search.live) :]:
            _write(sequence, first)


def _search_of(request: Request) -> BeamSearch:
    assert request.search is not None, "only what searches has beams"
    return request.search


def _live_sequences(request: Request) -> list[Sequence]:
    return request.sequences[: len(_search_of(request).live)]


def _take_over(sequence: Sequence, parent: Sequence, pool: BlockPool) -> None:
    """Makes `sequence` what `parent` is now, in its own row if it has one."""
    sequence.token_ids = list(parent.token_ids)
    sequence.digests = list(parent.digests)
    if sequence.row is None:  # it has waited since the search began, and computes what it needs
        sequence.patience = 0  # for all the others are going to wait for it
        return
    pool.share(parent.block_ids)  # first: the two may have blocks in common
    pool.free(sequence.block_ids)
    sequence.block_ids = list(parent.block_ids)
    sequence.num_computed_tokens = parent.num_computed_tokens
    sequence.is_forked = True


def _end(request: Request, search: BeamSearch) -> None:
    """Gives each sequence one of the hypotheses, best first."""
    for sequence, found in zip(request.sequences, search.finished, strict=True):
        _write(sequence, found.beam)
        sequence.hypothesis = found


def _write(sequence: Sequence, beam: Beam) -> None:
    sequence.token_ids = [*sequence.request.prompt_token_ids, *beam.token_ids]
    sequence.digests = []
    sequence.candidates = sequence.finish_reason = sequence.stop_reason = None
