"""The benchmark of sharing and swapping, over a tiny model: what it compares and what it counts."""

import json
import sys

import pytest

from benchmarks import savings
from benchmarks.random_checkpoint import TINY, write_checkpoint

COMMAND = (
    "savings --model {model} --sequences 12 --parallel 2 4 --system-prompt 24 --max-input 30 "
    "--max-output 40 --num-blocks 30 --block-size 8 --repeats 1"
)


def test_each_pair_does_the_same_work_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, TINY, seed=0)
    monkeypatch.setattr(sys, "argv", COMMAND.format(model=tmp_path).split())
    savings.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    pairs = {pair["work"]: pair["sides"] for pair in report["pairs"]}
    assert list(pairs) == ["n = 2", "n = 4", "system prompt", "a crowd"]
    for name in ("n = 2", "n = 4", "system prompt"):
        sharing, apart = pairs[name]["sharing"], pairs[name]["not sharing"]
        assert sharing["computed_tokens"] < apart["computed_tokens"]
        assert sharing["mean_rows"] > 1
    swapping, recomputing = pairs["a crowd"]["swapping"], pairs["a crowd"]["recomputing"]
    assert swapping["swapped_out_blocks"] > 0 == recomputing["swapped_out_blocks"]
    assert recomputing["preemptions"] > 0
    assert swapping["computed_tokens"] <= recomputing["computed_tokens"]


def test_a_crowd_swaps_or_does_what_the_engine_does_by_default():
    assert savings.ENGINES[savings.DEFAULT] == {}
    assert savings.ENGINES[savings.SWAPPING].keys() == {"swap_space"}


@pytest.mark.parametrize(
    "option", ["--parallel 0", "--num-blocks none", "--block-size 24", "--trace nowhere.csv"]
)
def test_bad_arguments_are_refused_before_anything_is_loaded(option: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["savings", *option.split()])
    with pytest.raises(SystemExit):
        savings.main()
    assert option.split()[0] in capsys.readouterr().err
