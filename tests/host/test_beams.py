"""Beam search by itself: what the plainest search finds, in places that fit together."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.beams import MAX_BEAM_WIDTH, Beam, BeamSearch, BeamSearchParams
from tests.host.beam_tables import Table, assert_same, every_answer, plain_search, run_search

PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
EARLY: tuple[Any, ...] = (False, True, "never")
END_IDS = ((), (0,), (0, 1, 2))


@settings(max_examples=400)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 6),
    vocab_size=st.integers(9, 23),
    max_tokens=st.integers(1, 14),
    length_penalty=st.sampled_from(PENALTIES),
    early_stopping=st.sampled_from(EARLY),
    end_ids=st.sampled_from(END_IDS),
    sharpness=st.sampled_from([0.3, 1.5, 4.0]),
    end_bias=st.sampled_from([-3.0, 0.0, 1.5, 4.0]),
)
def test_hypotheses_are_those_of_a_search_over_whole_vocabularies(
    seed: int,
    vocab_size: int,
    width: int,
    end_ids: tuple[int, ...],
    sharpness: float,
    end_bias: float,
    **others: Any,
):
    table = Table(vocab_size, seed=seed, sharpness=sharpness, end_bias=end_bias)
    params = BeamSearchParams(beam_width=width, **others)
    expected = plain_search(table, params, end_ids)
    assert len(expected) == width
    assert_same(run_search(table, params, end_ids), expected, params)


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("end_ids", [(), (0,)])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_answers_of_all(
    length_penalty: float, end_ids: tuple[int, ...]
):
    """No first token is lost, so that two tokens are searched exhaustively."""
    compared = 0
    for seed in range(30):
        table = Table(8, seed=seed)
        params = BeamSearchParams(
            beam_width=8 - len(end_ids),
            max_tokens=2,
            length_penalty=length_penalty,
            early_stopping="never",
        )
        best = every_answer(table, params, end_ids)[: params.beam_width]
        # An end that is the unlikeliest first token of all is not counted.
        if [0] in [tokens for tokens, _ in best] and np.argmin(table.logprobs([3, 5, 4])) == 0:
            continue
        compared += 1
        assert_same(run_search(table, params, end_ids), best, (seed, params))
    assert compared > 20


@given(seed=st.integers(0, 10**6), width=st.integers(1, 7), num_steps=st.integers(1, 9))
def test_beams_stay_in_their_places_with_their_likeliest_token_and_others_fill_the_rest(
    seed: int, width: int, num_steps: int
):
    rng = np.random.default_rng(seed)
    search = BeamSearch(
        params=BeamSearchParams(beam_width=width, max_tokens=None),
        end_ids=frozenset({0}),
        max_tokens=100,
    )
    for _ in range(num_steps):
        before = search
        logprobs = np.sort(-rng.exponential(size=(len(search.live), search.num_candidates)))
        candidates = [[(t + 1, float(p)) for t, p in enumerate(row[::-1])] for row in logprobs]
        search = before.advance(candidates)
        assert len(search.live) == len(search.parents) == width
        assert before.live == dataclasses.replace(before).live  # nothing changed in place
        for parent in set(search.parents):
            children = [b for b, p in zip(search.live, search.parents, strict=True) if p == parent]
            assert search.parents[parent] == parent
            assert search.live[parent].logprob == max(child.logprob for child in children)
        for beam, parent in zip(search.live, search.parents, strict=True):
            assert beam.before is before.live[parent]
            assert beam.token_ids == [*before.live[parent].token_ids, beam.token]


def test_long_beams_share_what_they_have_in_common_and_go_away_without_recursion():
    beam = Beam(None, -1, 0.0, 0)
    for token in range(200_000):
        beam = Beam(beam, token, 0.0, token + 1)
    assert beam.token_ids == list(range(200_000))
    assert len(repr(beam)) < 100
    del beam


def test_defaults_are_those_of_vllm_and_transformers():
    params = BeamSearchParams(beam_width=4)
    assert (params.max_tokens, params.ignore_eos, params.include_stop_str_in_output) == (
        16,
        False,
        False,
    )
    assert (params.length_penalty, params.early_stopping) == (1.0, False)
    assert params.num_returned == 4
    assert BeamSearchParams(beam_width=4, n=2).num_returned == 2


def test_sequences_are_sampled_greedily_and_values_stored_in_one_form():
    numpy_ints: Any = {"beam_width": np.int32(3), "stop_token_ids": [np.int64(5)]}
    params = BeamSearchParams(length_penalty=2, cache_salt="salt", max_tokens=None, **numpy_ints)
    assert type(params.beam_width) is int
    assert type(params.length_penalty) is float
    assert params.stop_token_ids == (5,)
    sampling = params.sampling_params
    assert (sampling.n, sampling.greedy, sampling.shapes_logits) == (3, True, False)
    assert (sampling.max_tokens, sampling.stop_token_ids) == (None, (5,))
    assert sampling.cache_salt == "salt"
    assert hash(dataclasses.replace(params)) == hash(params)
    assert dataclasses.replace(params, beam_width=2).num_returned == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", 0),
        ("beam_width", MAX_BEAM_WIDTH + 1),
        ("n", 0),
        ("n", 4),
        ("max_tokens", 0),
        ("length_penalty", 10.5),
        ("length_penalty", math.nan),
        ("length_penalty", -math.inf),
        ("early_stopping", "always"),
        ("stop_token_ids", [-1]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object):
    changes: dict[str, Any] = {"beam_width": 3} | {name: value}
    with pytest.raises(ValueError, match=name):
        BeamSearchParams(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", 2.0),
        ("beam_width", True),
        ("n", "2"),
        ("max_tokens", 4.0),
        ("length_penalty", "1"),
        ("length_penalty", None),
        ("early_stopping", 1),
        ("early_stopping", None),
        ("stop_token_ids", 3),
        ("ignore_eos", 1),
        ("detokenize", "yes"),
        ("cache_salt", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: object):
    changes: dict[str, Any] = {"beam_width": 3} | {name: value}
    with pytest.raises(TypeError, match=name):
        BeamSearchParams(**changes)


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="num_beams"):
        BeamSearchParams(num_beams=3)  # pyright: ignore[reportCallIssue]
