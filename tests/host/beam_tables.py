"""Small made-up language models, and beam search over them written as plainly as can be."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jpaged.beams import BeamSearch, BeamSearchParams
from jpaged.outputs import RequestOutput

PROMPT = [3, 5, 4]
MOST = 41  # tokens; each count has logits of its own, lest two ways of a beam be equally likely
Scored = list[tuple[list[int], float]]  # generated tokens and their score, best first


class Table:
    """Logits that depend on the last two tokens and on how many there are.

    Of high `sharpness`, one continuation is far likelier than the others; `end_bias` makes the
    first token ids, which end a sequence in most tests, likelier.
    """

    def __init__(
        self, vocab_size: int, *, seed: int, sharpness: float = 1.5, end_bias: float = 0.0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.last = (sharpness * rng.standard_normal((vocab_size, vocab_size))).astype(np.float32)
        self.before = rng.standard_normal((vocab_size, vocab_size)).astype(np.float32)
        self.count = rng.standard_normal((MOST, vocab_size)).astype(np.float32)
        self.count[:, :3] += end_bias

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The logits behind `token_ids`, `[V]`."""
        *_, before, last = token_ids
        return self.last[last] + self.before[before] + self.count[len(token_ids)]

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        logits = self.logits(token_ids).astype(np.float64)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())


def run_search(table: Table, params: BeamSearchParams, end_ids: Sequence[int]) -> Scored:
    """What `BeamSearch` finds, given no more than it says it looks at."""
    assert params.max_tokens is not None
    search = BeamSearch(params=params, end_ids=frozenset(end_ids), max_tokens=params.max_tokens)
    while not search.over:
        candidates = []
        for beam in search.live:
            logprobs = table.logprobs([*PROMPT, *beam.token_ids])
            top = np.argsort(-logprobs, kind="stable")[: search.num_candidates]
            candidates.append([(int(token), float(logprobs[token])) for token in top])
        search = search.advance(candidates)
    return [(found.beam.token_ids, found.score) for found in search.finished]


class Model(Protocol):
    """What a plain search needs."""

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray: ...


def plain_search(
    model: Model,
    params: BeamSearchParams,
    end_ids: Sequence[int],
    prompt: Sequence[int] = PROMPT,
) -> Scored:
    """The same by Transformers' rules, from whole vocabularies and with copies of everything."""
    width, penalty, most = params.beam_width, params.length_penalty, params.max_tokens
    assert most is not None
    num_kept = max(2, 1 + len(end_ids)) * width
    beams: Scored = [([], 0.0)]
    finished: Scored = []
    for length in range(1, most + 1):
        children = [
            ([*tokens, token], logprob + float(more))
            for tokens, logprob in beams
            for token, more in enumerate(model.logprobs([*prompt, *tokens]))
        ]
        children.sort(key=lambda child: -child[1])
        kept = children[:num_kept]
        for tokens, logprob in kept[:width]:
            if tokens[-1] in end_ids or length == most:
                finished.append((tokens, logprob / length**penalty))
        finished.sort(key=lambda found: -found[1])
        finished = finished[:width]
        beams = [child for child in kept if child[0][-1] not in end_ids][:width]
        if len(finished) < width:
            continue
        longest = most if params.early_stopping == "never" and penalty > 0 else length
        hope = beams[0][1] / longest**penalty
        if params.early_stopping is True or width == 1 or hope <= finished[-1][1]:
            break
    return finished


def every_answer(table: Table, params: BeamSearchParams, end_ids: Sequence[int]) -> Scored:
    """All that could be generated, by score."""
    most = params.max_tokens
    assert most is not None
    vocabulary = range(table.last.shape[0])
    answers = []
    for length in range(1, most + 1):
        for tokens in itertools.product(vocabulary, repeat=length):
            ends_early = any(token in end_ids for token in tokens[:-1])
            if ends_early or (length < most and tokens[-1] not in end_ids):
                continue
            logprob = sum(
                table.logprobs([*PROMPT, *tokens[:i]])[token] for i, token in enumerate(tokens)
            )
            answers.append((list(tokens), logprob / length**params.length_penalty))
    return sorted(answers, key=lambda answer: -answer[1])


def scored(output: RequestOutput) -> Scored:
    """What an engine found."""
    assert all(found.score is not None for found in output.outputs)
    return [(found.token_ids, found.score or 0.0) for found in output.outputs]


def assert_same(found: Scored, expected: Scored, case: Any, tolerance: float = 1e-9) -> None:
    """Fails where any token differs, or a score by more than `tolerance`."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected], case
    scores = [score for _, score in found], [score for _, score in expected]
    np.testing.assert_allclose(*scores, rtol=0, atol=tolerance, err_msg=str(case))
