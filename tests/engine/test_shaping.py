"""Penalties, biases and forbidden tokens: by the definitions, whatever happens to the rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jpaged.batch import sampling_spec, unpack
from jpaged.engine import Engine
from jpaged.params import SamplingParams
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.programs import Outputs, ShapedStep, StartShape
from jpaged.requests import Request
from jpaged.requests import Sequence as TokenSequence
from jpaged.runner import Runner
from jpaged.sampling import noise
from jpaged.shape_batch import (
    MAX_ENTRIES,
    MAX_FORBIDDEN,
    pack_shape_starts,
    shape_start_spec,
)
from jpaged.shaping import count_tokens, shape_logits, start_row, zero_shape
from jpaged.state import LogitShape, ShapeBatch
from jpaged.step import StepOutput
from tests.helpers import (
    NEAR_TIE,
    assert_close,
    generated,
    make_prompt,
    make_request,
    record_logits,
    run_to_end,
    teacher_forced,
    tiny_engine,
)

V = 53
KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 2.0, "frequency_penalty": -0.4},
    {"frequency_penalty": 1.3},
    {"logit_bias": {7: 30.0, 9: -100.0, 11: 28.5}, "presence_penalty": 1.5},
    {},
    {"allowed_token_ids": [5, 8, 13, 21, 34], "repetition_penalty": 1.2},
    {"bad_words": [[30], [17, 4], [4, 17, 17]], "logit_bias": {17: 9.0, 4: 9.0}},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.3, "bad_words": [[6], [7]]},
]


def bent(
    logits: np.ndarray, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> np.ndarray:
    """The definitions, token by token, in float64; -inf is forbidden."""
    found = np.full(len(logits), -np.inf)
    history = [*prompt, *output]
    for token, logit in enumerate(logits.tolist()):
        value = logit + (params.logit_bias or {}).get(token, 0.0)
        if token in history and value > 0:
            value /= params.repetition_penalty
        elif token in history:
            value *= params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty if token in output else 0.0
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            continue
        if any([*history, token][-len(word) :] == list(word) for word in params.bad_words):
            continue
        found[token] = value
    return found


def as_new_row(row: int, request: Request, output: Sequence[int] = ()) -> ScheduledRow:
    """A row that starts with these tokens generated already."""
    sequence = request.sequences[0]
    sequence.token_ids += output
    count = sequence.num_tokens
    return ScheduledRow(sequence, row, 0, count, True, (), is_new=True, feeds_back=False)


def started(shape: LogitShape, row: ScheduledRow) -> LogitShape:
    num_rows, vocab_size = shape.counts.shape
    for packed in pack_shape_starts(row, padding_row=num_rows, vocab_size=vocab_size):
        shape = start_row(shape, unpack(jnp.asarray(packed), shape_start_spec()))
    return shape


def shape_batch(row_ids: list[int]) -> ShapeBatch:
    padding = jnp.full((len(row_ids), MAX_FORBIDDEN), -1, jnp.int32)
    return ShapeBatch(jnp.asarray(row_ids, jnp.int32), padding)


def test_bent_logits_are_those_of_the_definitions():
    rng, num_rows = np.random.default_rng(1), 11
    shape = zero_shape(num_rows, V)
    kinds = [kind for kind in KINDS if kind]
    rows = rng.permutation(num_rows)[: len(kinds)].tolist()
    requests = [make_request(make_prompt(9, seed=i), **kind) for i, kind in enumerate(kinds)]
    outputs = [rng.integers(0, V, 14).tolist() for _ in kinds]
    for row in rows:  # of somebody who was there before
        shape = started(shape, as_new_row(row, make_request(make_prompt(20), **kinds[0]), [5, 5]))
    for row, request, output in zip(rows, requests, outputs, strict=True):
        shape = started(shape, as_new_row(row, request, output[:10]))
    ids = jnp.asarray([*rows, num_rows], jnp.int32)
    for tokens in np.array(outputs).T[10:]:  # the rest is sampled on the device
        shape = count_tokens(shape, ids, jnp.asarray([*tokens, 3], jnp.int32))
    logits = (rng.standard_normal((len(rows) + 2, V)) * 8).astype(np.float32)
    # Two rows that bend nothing: padding, and a row of the batch that the state never heard of.
    batch = shape_batch([*rows, num_rows, num_rows])
    found = np.asarray(shape_logits(jnp.asarray(logits), shape, batch))
    np.testing.assert_array_equal(found[len(rows) :], logits[len(rows) :])
    for i, request in enumerate(requests):
        one_token = [word for word in request.params.bad_words if len(word) == 1]
        params = dataclasses.replace(request.params, bad_words=one_token)
        expected = bent(logits[i], request.prompt_token_ids, outputs[i], params)
        kept = np.isfinite(expected)
        assert (found[i][~kept] == np.float32(-1e30)).all()
        assert_close(found[i][kept], expected[kept], 1e-6)


def test_a_history_longer_than_one_start_holds_is_entered_whole():
    vocab_size = 3 * MAX_ENTRIES
    prompt = np.random.default_rng(2).permutation(vocab_size)[: 2 * MAX_ENTRIES + 7].tolist()
    allowed = prompt[: MAX_ENTRIES + 1]
    request = make_request(prompt, repetition_penalty=1.5, allowed_token_ids=allowed)
    output = [*range(MAX_ENTRIES + 3), 4, 4, MAX_ENTRIES + 1]
    shape = started(zero_shape(3, vocab_size), as_new_row(1, request, output))
    counts = np.bincount(output, minlength=vocab_size)
    np.testing.assert_array_equal(shape.counts, np.stack([0 * counts, counts, 0 * counts]))
    np.testing.assert_array_equal(np.flatnonzero(shape.in_prompt[1]), np.sort(prompt))
    np.testing.assert_array_equal(np.flatnonzero(shape.bias[1] == 0), np.sort(allowed))
    assert not shape.in_prompt[::2].any()
    assert not shape.bias[::2].any()


def mixed_requests(**changes: Any) -> list[Request]:
    """A request of each kind, more than there are rows."""
    fields = {"max_tokens": 17, **changes}
    return [
        make_request(make_prompt(3 + 5 * i % 14, seed=i), seed=i, **kind, **fields)
        for i, kind in enumerate(KINDS)
    ]


Logits = dict[TokenSequence, dict[int, np.ndarray]]


def record_raw(engine: Engine) -> Logits:
    """From now on, the model's own logits of each sequence by position."""
    seen: Logits = {}

    def record(sequence: TokenSequence, start: int, logits: np.ndarray) -> None:
        for position, row in enumerate(logits, start):
            seen.setdefault(sequence, {})[position] = row

    record_logits(engine, record)
    return seen


def gumbel(sequence: TokenSequence, position: int) -> np.ndarray:
    """The noise of one token."""
    rows = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sampling_spec(1))
    seed, index, where = jnp.asarray([sequence.request.seed, sequence.index, position])
    rows = dataclasses.replace(rows, seed_low=seed[None], index=index[None])
    return np.asarray(_noise(rows, where[None], vocab_size=V))[0]


_noise = jax.jit(noise, static_argnames="vocab_size")


def assert_by_definition(requests: Sequence[Request], seen: Logits) -> None:
    """Each token is the best of what the definitions make of the model's logits and the noise."""
    for sequence in [s for request in requests for s in request.sequences]:
        request = sequence.request
        params, output = request.params, sequence.output_token_ids
        assert len(output) == params.max_tokens
        for count, token in enumerate(output):
            position = request.sequences[0].num_prompt_tokens + count
            # A fork samples its first token from the logits of the first sequence.
            lead = sequence if position - 1 in seen.get(sequence, {}) else request.sequences[0]
            logits = seen[lead][position - 1]
            scores = bent(logits, request.prompt_token_ids, output[:count], params)
            if params.temperature:
                scores = scores / params.temperature + gumbel(sequence, position)
            assert scores[token] >= scores.max() - NEAR_TIE, (params, count)


def assert_it_matters(requests: Sequence[Request]) -> None:
    """Without the options, the same requests get other tokens."""
    plain = [
        make_request(r.prompt_token_ids, r.params, seed=r.seed, **NOTHING)
        for r in requests
        if r.params.shapes_logits
    ]
    run_to_end(tiny_engine(), plain)
    bending = [r for r in requests if r.params.shapes_logits]
    for request, other in zip(bending, plain, strict=True):
        assert generated(request) != generated(other), request.params


NOTHING: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
}


def test_greedy_rows_of_every_kind_go_by_the_definitions_side_by_side():
    engine = tiny_engine()
    seen, requests = record_raw(engine), mixed_requests()
    run_to_end(engine, requests)
    assert_by_definition(requests, seen)
    assert_it_matters(requests)


def test_counts_survive_preemption():
    engine = tiny_engine(num_blocks=10)
    seen, requests = record_raw(engine), mixed_requests(max_tokens=44)
    schedule, num_resumed = engine.scheduler.schedule, 0

    def schedule_counting() -> StepPlan | None:
        nonlocal num_resumed
        plan = schedule()
        for row in plan.rows if plan else ():
            sequence = row.sequence
            resumed = row.is_new and sequence.num_output_tokens > 0
            num_resumed += resumed and sequence.request.params.penalizes
        return plan

    engine.scheduler.schedule = schedule_counting
    run_to_end(engine, requests)
    assert num_resumed > 2
    assert_by_definition(requests, seen)


def test_each_fork_of_a_request_counts_for_itself():
    engine = tiny_engine()
    seen = record_raw(engine)
    requests = mixed_requests(n=3, temperature=1.2)
    run_to_end(engine, requests)
    assert engine.stats().copied_blocks > 0
    assert all(len(set(map(tuple, generated(request)))) == 3 for request in requests)
    assert_by_definition(requests, seen)


def test_a_request_that_comes_late_finds_rows_in_the_middle_of_their_text():
    engine = tiny_engine()
    seen, requests = record_raw(engine), mixed_requests()
    early = [r for r in requests if not r.params.shapes_logits]
    for request in early:
        engine.scheduler.add(request)
    for _ in range(5):
        engine.step()
    assert engine.runner.shape is None
    run_to_end(engine, [r for r in requests if r.params.shapes_logits])
    assert engine.runner.shape is not None
    assert_by_definition(requests, seen)


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("lost", ["pool", "shape", "nothing"])
def test_counts_survive_a_failed_step(number: int, lost: str):
    engine = tiny_engine()
    runner, seen, requests = engine.runner, record_raw(engine), mixed_requests()
    run, count = runner.run, 0

    def run_and_lose(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        nonlocal count
        count += 1
        out = run(plan, outputs)
        if count == number:
            gone = {"pool": runner.pool, "shape": runner.shape, "nothing": ()}[lost]
            for leaf in jax.tree.leaves(gone):
                leaf.delete()
            assert runner.is_lost == (lost != "nothing")
            raise RuntimeError("after the donation")
        return out

    runner.run = run_and_lose
    run_to_end(engine, requests)
    assert engine.stats().recoveries == 1
    assert not runner.is_lost
    assert_by_definition(requests, seen)


def words_in(token_ids: list[int], words: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    return [
        word
        for word in words
        for start in range(len(token_ids))
        if token_ids[start : start + len(word)] == list(word)
    ]


def test_bad_words_never_come_and_nothing_that_is_not_allowed():
    words = [[5], [6, 7], [7, 7, 8], [8, 6], [9, 6, 9]]
    fields: dict[str, Any] = {"allowed_token_ids": [5, 6, 7, 8, 9, 10], "temperature": 9.0, "n": 3}
    prompt = [*make_prompt(6), 9, 6]
    free = make_request(prompt, **fields, max_tokens=60)
    good = make_request(prompt, **fields, max_tokens=60, bad_words=words)
    run_to_end(tiny_engine(), [free, good])
    for output in (*generated(free), *generated(good)):
        assert set(output) <= {5, 6, 7, 8, 9, 10}
    assert {*map(tuple, words)} <= {
        tuple(word) for output in generated(free) for word in words_in(output, words)
    }
    for output in generated(good):
        assert not words_in([*prompt, *output][len(prompt) - 2 :], words)
        assert set(output) == {6, 7, 8, 9, 10}


def test_logprobs_stay_those_of_the_model_itself():
    request = make_request(
        make_prompt(5), logprobs=2, logit_bias={9: 90.0}, frequency_penalty=2.0, max_tokens=6
    )
    run_to_end(tiny_engine(), [request])
    (sequence,) = request.sequences
    again = make_request(sequence.token_ids, max_tokens=1)
    (logits,) = teacher_forced(tiny_engine(enable_prefix_caching=False), [again])
    for row, token, entries in zip(
        logits[4:], sequence.output_token_ids, sequence.logprobs, strict=False
    ):
        exact = row - np.log(np.sum(np.exp(row.astype(np.float64))))
        assert entries[token].logprob == pytest.approx(exact[token], abs=1e-3)
        assert entries[token].rank == 1 + np.sum(exact > exact[token])
        assert max(e.logprob for e in entries.values()) == pytest.approx(exact.max(), abs=1e-3)


def test_programs_and_state_come_with_the_first_request_that_needs_them_and_not_before():
    engine = tiny_engine()
    runner: Runner = engine.runner
    rare = (ShapedStep, StartShape)  # its own, not the shared ones
    runner.programs = {p: c for p, c in runner.programs.items() if not isinstance(p, rare)}
    num_programs, num_lazy = runner.num_programs, runner.lazy_compiles
    plain = [make_request(make_prompt(n, seed=n), temperature=n % 2) for n in (3, 12, 30)]
    run_to_end(engine, plain)
    assert runner.shape is None
    assert (runner.num_programs, runner.lazy_compiles) == (num_programs, num_lazy)
    for _ in range(2):  # the second time, all is there
        run_to_end(engine, [make_request(make_prompt(9), presence_penalty=1.0)])
        assert (runner.num_programs, runner.lazy_compiles) == (num_programs + 3, num_lazy + 3)
    donated = jax.tree.leaves((runner.pool, runner.state, runner.shape))
    for program in [p for p in runner.programs if isinstance(p, ShapedStep)]:
        analysis = runner.programs[program].memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes == sum(leaf.nbytes for leaf in donated)
    runner.reset()
    assert runner.shape is None
    assert all(leaf.is_deleted() for leaf in donated)


def test_a_wrong_shape_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        shape_logits(jnp.zeros((3, V, 1)), zero_shape(4, V), shape_batch([0, 1, 2]))
