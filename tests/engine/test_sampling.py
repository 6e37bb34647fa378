"""Sampling: the distribution is exact, and a token's noise depends on its own request alone."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jpaged.batch import MAX_STOP_IDS
from jpaged.engine import Engine
from jpaged.outputs import CompletionOutput
from jpaged.params import SamplingParams
from jpaged.plan import StepPlan
from jpaged.programs import Outputs
from jpaged.requests import Request
from jpaged.sampling import argmax, filter_logits, noise, sample
from jpaged.state import SamplingRows
from jpaged.step import StepOutput
from tests.helpers import (
    generated,
    llm_over,
    make_prompt,
    make_request,
    run_to_end,
    tiny_engine,
)

V = 23
NUM_DRAWS = 4096
SAMPLED: dict[str, Any] = {"temperature": 0.8, "max_tokens": 9}


def make_rows(count: int, *, seeds: Any = 0, **params: Any) -> SamplingRows:
    """`count` rows alike but for their seeds."""

    def ints(value: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (count,))

    def floats(name: str, default: float) -> jax.Array:
        return jnp.full(count, params.get(name, default), jnp.float32)

    return SamplingRows(
        seed_low=ints(seeds),
        seed_high=ints(params.get("seed_high", 0)),
        index=ints(params.get("index", 0)),
        top_k=ints(params.get("top_k", 0)),
        first_stop=ints(params.get("first_stop", 0)),
        stop_ids=jnp.full((count, MAX_STOP_IDS), -1).at[:, 0].set(params.get("stop_id", -1)),
        temperature=floats("temperature", 1.0),
        top_p=floats("top_p", 1.0),
        min_p=floats("min_p", 0.0),
    )


def exact_probabilities(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Each filter applied to what the one before it left, in float64; ties at a threshold stay."""
    logits = logits.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max())
    weights[weights < min_p] = 0
    if 0 < top_k < len(weights):
        weights[weights < np.sort(weights)[-top_k]] = 0
    if top_p < 1:
        ordered = np.sort(weights)[::-1]
        needed = np.searchsorted(np.cumsum(ordered) / ordered.sum(), top_p * (1 - 1e-12))
        weights[weights < ordered[needed]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.3, "min_p": 0.05, "top_k": 11, "top_p": 0.8},
        {"top_k": 1},
        {"top_k": 1000, "top_p": 0.999},
    ],
    ids=str,
)
def test_drawn_tokens_follow_the_exact_distribution(params: dict[str, Any]):
    logits = np.random.default_rng(5).standard_normal(V).astype(np.float32) * 1.5
    rows = make_rows(NUM_DRAWS, seeds=jnp.arange(NUM_DRAWS), **params)
    tokens = sample(
        jnp.broadcast_to(jnp.asarray(logits), (NUM_DRAWS, V)),
        rows,
        jnp.full(NUM_DRAWS, 17, jnp.int32),
    )
    counts = np.bincount(np.asarray(tokens), minlength=V)
    probabilities = exact_probabilities(logits, **params)
    assert counts[probabilities == 0].sum() == 0, "a token that was filtered out was drawn"
    kept = probabilities > 0
    if kept.sum() > 1:
        found = stats.chisquare(counts[kept], NUM_DRAWS * probabilities[kept])
        assert found.pvalue > 1e-3


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, V + 2),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    spread=st.floats(0.01, 30.0),
)
def test_filters_keep_exactly_what_the_definition_keeps(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float
):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, V)) * spread).astype(np.float32)
    params = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = np.asarray(_filter(jnp.asarray(logits), make_rows(3, **params))) > -1e29
    for row in range(3):
        expected = exact_probabilities(logits[row], **params) > 0
        # Rounding may move a token that lies on a threshold to within a float's width.
        nudged = [
            exact_probabilities(
                logits[row], top_k=top_k, top_p=min(top_p * by, 1.0), min_p=min_p * by
            )
            > 0
            for by in (1 - 1e-5, 1 + 1e-5)
        ]
        sure = (expected == nudged[0]) & (expected == nudged[1])
        np.testing.assert_array_equal(kept[row][sure], expected[sure])


_filter = jax.jit(filter_logits)


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 700])
def test_argmax_is_the_first_of_the_highest(vocab_size: int):
    x = np.random.default_rng(vocab_size).integers(0, 9, (40, vocab_size)).astype(np.float32)
    np.testing.assert_array_equal(argmax(jnp.asarray(x - 5)), np.argmax(x, axis=-1))


def test_ties_at_a_threshold_all_stay():
    logits = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = np.asarray(filter_logits(logits, make_rows(1, top_k=2))) > -1e29
    assert kept[0].tolist() == [True, False, True, True, True, False]


def test_noise_is_bit_equal_alone_in_a_batch_of_32_and_in_another_order():
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**31), 2**31, 32)
    positions = jnp.asarray(rng.integers(0, 4000, 32), jnp.int32)
    draw = jax.jit(noise, static_argnames="vocab_size")
    together = np.asarray(draw(make_rows(32, seeds=seeds), positions, vocab_size=V))
    order = rng.permutation(32)
    shuffled = draw(make_rows(32, seeds=seeds[order]), positions[order], vocab_size=V)
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(32):
        alone = draw(make_rows(1, seeds=seeds[row]), positions[row : row + 1], vocab_size=V)
        np.testing.assert_array_equal(alone[0], together[row])


def test_noise_is_the_same_in_every_version_of_jax_and_not_drawn_for_padding():
    rows = make_rows(2, seeds=jnp.asarray([7, -3]), seed_high=5, index=1)
    found = np.asarray(noise(rows, jnp.asarray([17, 4000]), vocab_size=49152))
    first, last = [-0.58175355, -0.6738815, 1.9379344], [2.1034818, -0.37160644, 0.13529445]
    np.testing.assert_array_equal(found[0, :3], np.asarray(first, np.float32))
    np.testing.assert_array_equal(found[1, -3:], np.asarray(last, np.float32))


def test_no_program_sorts_the_vocabulary():
    logits, positions = jnp.zeros((3, 49152)), jnp.zeros(3, jnp.int32)
    filtered = make_rows(3, top_k=40, top_p=0.9, min_p=0.05)
    text = jax.jit(sample).lower(logits, filtered, positions).compile().as_text()
    assert text is not None
    assert "fusion" in text
    assert " sort(" not in text


def test_seed_halves_index_and_position_each_change_the_noise():
    kinds = [{}, {"seeds": 1}, {"seed_high": 1}, {"index": 1}]
    found = [noise(make_rows(1, **kind), jnp.asarray([7]), vocab_size=V) for kind in kinds]
    found.append(noise(make_rows(1), jnp.asarray([8]), vocab_size=V))
    assert len({np.asarray(one).tobytes() for one in found}) == 5


def record_noise(engine: Engine) -> dict[tuple[str, int, int], set[bytes]]:
    """From now on, the noise of every token sampled, by (request, sequence index, position).

    That this noise is what picked the token is checked against the step's own logits.
    """
    run, seen = engine.runner.run, {}
    draw = jax.jit(noise, static_argnames="vocab_size")

    def run_recording(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        assert outputs is Outputs.TOKENS
        out = run(plan, Outputs.LOGITS)
        assert out.logits is not None
        ends = np.cumsum([row.num_tokens for row in plan.rows])
        last_tokens = {row.row: end - 1 for row, end in zip(plan.rows, ends, strict=True)}
        leads = [row.row if row.forked is None else row.forked for row in plan.rows]
        logits = np.asarray(out.logits)[[last_tokens[row] for row in leads]]
        rows = jnp.asarray([row.row for row in plan.rows])
        params = jax.tree.map(lambda leaf: leaf[rows], engine.runner.state.sampling)
        positions = jnp.asarray([row.seq_len for row in plan.rows])
        found = np.asarray(draw(params, positions, vocab_size=53))
        scores = logits / SAMPLED["temperature"] + found
        tokens = np.asarray(out.tokens)
        for row, bits, token, score in zip(plan.rows, found, tokens, scores, strict=False):
            if row.samples:
                assert score[token] > score.max() - 1e-4
                key = (row.sequence.request.request_id, row.sequence.index, row.seq_len)
                seen.setdefault(key, set()).add(bits.tobytes())
        return out

    engine.runner.run = run_recording
    return seen


def sampled_requests(count: int = 7) -> list[Request]:
    """Requests whose ids say what they are, so that runs can be compared."""
    requests = []
    for i in range(count):
        prompt = make_prompt(1 + 5 * i % 17, seed=i)
        request = make_request(prompt, seed=2**40 + i, n=1 + i % 2, ignore_eos=True, **SAMPLED)
        request.request_id = str(i)
        requests.append(request)
    return requests


def test_noise_and_tokens_do_not_depend_on_what_runs_beside_them():
    def outcome(order: list[int], **limits: int) -> tuple[dict, dict[str, list]]:
        engine = tiny_engine(**limits)
        requests = sampled_requests()
        seen = record_noise(engine)
        run_to_end(engine, [requests[i] for i in order])
        if limits.get("num_blocks"):
            assert engine.stats().preemptions > 0
        return seen, {
            request.request_id: generated(request)
            for request in requests
            if request.request_id in {str(i) for i in order}
        }

    everything = list(range(7))
    noise_seen, tokens = outcome(everything)
    assert all(len(bits) == 1 for bits in noise_seen.values())
    assert len({*map(frozenset, noise_seen.values())}) == len(noise_seen)
    for order, limits in [
        (everything[::-1], {}),
        ([3], {}),
        (everything, {"num_blocks": 6}),
    ]:
        other_noise, other_tokens = outcome(order, **limits)
        # A subset where fewer ran. No near tie is among these tokens, so the text is equal too.
        assert other_noise == {k: v for k, v in noise_seen.items() if k in other_noise}
        assert other_tokens == {k: v for k, v in tokens.items() if k in other_tokens}


def test_the_two_sequences_of_a_request_differ_and_a_seed_repeats_itself():
    engine = tiny_engine()
    prompt = make_prompt(9)
    requests = [make_request(prompt, seed=s, n=2, ignore_eos=True, **SAMPLED) for s in (5, 5, 6)]
    run_to_end(engine, requests)
    first, again, other = map(generated, requests)
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_greedy_rows_are_not_affected_by_sampled_neighbours():
    prompts = [make_prompt(4 + 3 * i, seed=i) for i in range(3)]
    greedy = [make_request(prompt, temperature=0, max_tokens=9) for prompt in prompts]
    run_to_end(tiny_engine(), greedy)
    mixed = [make_request(prompt, temperature=0, max_tokens=9) for prompt in prompts]
    others = [make_request(p, seed=i, **SAMPLED, top_p=0.9) for i, p in enumerate(prompts)]
    run_to_end(tiny_engine(), [r for pair in zip(mixed, others, strict=True) for r in pair])
    assert [generated(r) for r in mixed] == [generated(r) for r in greedy]
    assert [generated(r) for r in others] != [generated(r) for r in greedy]


def test_stop_ids_come_no_earlier_than_min_tokens():
    prompt = make_prompt(6)
    free = make_request(prompt, temperature=0, max_tokens=8, ignore_eos=True)
    run_to_end(tiny_engine(), [free])
    tokens = generated(free)[0]
    stop = tokens[2]
    first = tokens.index(stop)
    stopped = make_request(prompt, ignore_eos=True, max_tokens=8, stop_token_ids=[stop])
    late = make_request(
        prompt, ignore_eos=True, max_tokens=8, stop_token_ids=[stop], min_tokens=first + 1
    )
    run_to_end(tiny_engine(), [stopped, late])
    assert generated(stopped)[0] == tokens[: first + 1]
    assert generated(late)[0][:first] == tokens[:first]
    assert stop not in generated(late)[0][: first + 1]
    assert len(generated(late)[0]) > first + 1


def test_logprobs_are_those_of_the_model_before_temperature():
    engine = tiny_engine()
    logits = []
    run = engine.runner.run

    def run_with_logits(plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        assert outputs is Outputs.LOGPROBS
        tables = jax.tree.map(jnp.copy, (engine.runner.pool, engine.runner.state))
        out = run(plan, Outputs.LOGITS)
        logits.append(np.asarray(out.logits)[plan.num_tokens - 1])
        engine.runner.pool, engine.runner.state = tables
        return run(plan, outputs)

    engine.runner.run = run_with_logits
    request = make_request(make_prompt(5), logprobs=3, **SAMPLED, ignore_eos=True)
    run_to_end(engine, [request])
    sequence = request.sequences[0]
    assert len(sequence.logprobs) == 9
    for row, token, entries in zip(
        logits, sequence.output_token_ids, sequence.logprobs, strict=True
    ):
        exact = np.log(exact_probabilities(row))
        order = np.argsort(-exact)
        assert set(entries) == {token, *order[:3].tolist()}
        assert next(iter(entries)) == token
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(exact[token_id], abs=1e-4)
            assert entry.rank == 1 + order.tolist().index(token_id)
    total = sum(
        e[t].logprob for e, t in zip(sequence.logprobs, sequence.output_token_ids, strict=True)
    )
    assert sequence.cumulative_logprob == pytest.approx(total)


def test_a_wrong_shape_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        sample(jnp.zeros((3, V)), make_rows(3), jnp.zeros(2, jnp.int32))


def test_best_of_returns_the_likeliest_of_the_sequences_that_n_would_return():
    def answers(**fields: Any) -> list[CompletionOutput]:
        params = SamplingParams(temperature=1.5, seed=3, max_tokens=9, ignore_eos=True, **fields)
        (output,) = llm_over(tiny_engine()).generate([make_prompt(11)], params)
        return output.outputs

    every = answers(n=4, logprobs=0)
    best = answers(n=2, best_of=4)
    ranked = sorted(every, key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
    assert [output.token_ids for output in best] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in best] == [output.index for output in ranked[:2]]
    for found, expected in zip(best, ranked, strict=False):
        assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
        assert found.logprobs is None
    with pytest.raises(ValueError, match="nothing to stream"):
        llm_over(tiny_engine()).stream(make_prompt(3), SamplingParams(best_of=2))
