"""Arrivals: a trace's own gaps at any rate, and lengths that are scaled before they are clipped."""

import json

import numpy as np
import pytest

from benchmarks.arrivals import (
    drawn_arrivals,
    prompts_of,
    read_arrivals,
    replaced_lengths,
    scaled_lengths,
)

CSV = "arrival_s,input_tokens,output_tokens\n0,40,7\n1,0,9\n2.5,600,12\n3,900,1\n7.5,2,30\n"


@pytest.fixture
def trace_path(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    return path


def pairs(trace) -> list[tuple[int, int]]:
    return [(pair.input_tokens, pair.output_tokens) for pair in trace.lengths]


def test_a_rate_scales_the_clock_and_nothing_else(trace_path):
    trace = read_arrivals(trace_path, 4)
    assert pairs(trace) == [(40, 7), (600, 12), (900, 1), (2, 30)]  # the empty prompt is left out
    prompts = prompts_of(trace, vocab_size=97, num_shared=0, seed=0)
    for rate in (0.5, 4.0):
        seconds = [arrival.seconds for arrival in trace.at_rate(rate, prompts)]
        assert (len(seconds) - 1) / seconds[-1] == pytest.approx(rate)
        assert np.diff(seconds) == pytest.approx(np.array([1, 0.2, 1.8]) / rate)
    assert [a.max_tokens for a in trace.at_rate(2, prompts)] == [7, 12, 1, 30]


def test_requests_may_be_passed_over(trace_path):
    trace = read_arrivals(trace_path, 2, first=2)
    assert pairs(trace) == [(900, 1), (2, 30)]
    assert trace.times == [0, 1]
    with pytest.raises(ValueError, match="has 4 requests, 2 from number 3 on"):
        read_arrivals(trace_path, 2, first=3)


def test_mooncake_counts_in_milliseconds(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [(0, 5, 6), (500, 7, 8), (2000, 9, 1)]
    names = ("timestamp", "input_length", "output_length")
    path.write_text("".join(json.dumps(dict(zip(names, x, strict=True))) + "\n" for x in lines))
    trace = read_arrivals(path, 3)
    assert trace.times == [0, 0.5, 2]
    assert pairs(trace) == [(5, 6), (7, 8), (9, 1)]


def test_lengths_without_arrivals_and_arrivals_all_at_once_are_refused(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n1,2\n")
    with pytest.raises(ValueError, match="needs the columns arrival_s, input_tokens"):
        read_arrivals(path, 1)
    path.write_text("arrival_s,input_tokens,output_tokens\n4,1,2\n4,1,2\n")
    with pytest.raises(ValueError, match="two requests that arrive one after the other"):
        read_arrivals(path, 2)


def test_drawn_arrivals_are_as_uneven_as_the_trace_and_depend_on_the_seed_alone():
    trace = drawn_arrivals(4000, seed=2)
    gaps = np.diff(trace.times)
    assert np.mean(gaps) == pytest.approx(1)
    assert np.std(gaps) == pytest.approx(1.09, abs=0.1)
    assert np.mean([i for i, _ in pairs(trace)]) == pytest.approx(1155, rel=0.05)
    assert trace == drawn_arrivals(4000, seed=2) != drawn_arrivals(4000, seed=3)


def test_lengths_are_scaled_first_and_clipped_then(trace_path):
    trace = read_arrivals(trace_path, 4)
    scaled = scaled_lengths(trace, 0.25, max_input=200, max_output=5)
    assert pairs(scaled) == [(10, 2), (150, 3), (200, 1), (1, 5)]
    assert scaled.times == trace.times


def test_lengths_may_come_from_a_law_or_from_another_file(trace_path, tmp_path):
    trace = read_arrivals(trace_path, 4)
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n" + "3,4\n" * 4)
    assert pairs(replaced_lengths(trace, str(path), seed=0)) == [(3, 4)] * 4
    drawn = replaced_lengths(trace, "sharegpt", seed=0)
    assert drawn.times == trace.times
    assert drawn.lengths != trace.lengths


def test_prompts_share_as_many_tokens_as_asked_for_and_keep_their_lengths(trace_path):
    trace = read_arrivals(trace_path, 4)
    prompts = prompts_of(trace, vocab_size=5003, num_shared=30, seed=0)
    assert list(map(len, prompts)) == [40, 600, 900, 2]
    assert prompts[0][:30] == prompts[1][:30] == prompts[2][:30]
    assert prompts[3] == prompts[0][:2]
    assert prompts[0][30:] != prompts[1][30:40]
    apart = prompts_of(trace, vocab_size=5003, num_shared=0, seed=0)
    assert apart[0][:30] != apart[1][:30]
