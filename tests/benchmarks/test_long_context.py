"""The benchmark of long prompts, at short ones."""

import json
import sys

import pytest

from benchmarks import long_context

TIMES = {"prefill_s", "prefill_tokens_per_s", "decode_ms"}


def test_every_context_has_its_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    command = (
        f"long_context --contexts 90 20 300 --output-len 3 --max-num-batched-tokens 64 "
        f"--block-size 8 --plot {plot}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    long_context.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = report["results"]
    assert [result["context"] for result in results] == [90, 20, 300]
    assert all(result[name] > 0 for result in results for name in TIMES)
    assert [result["kv_bytes"] for result in results] == [1024 * c for c in (90, 20, 300)]
    assert [result["scores_bytes"] for result in results] == [8 * t for t in (5760, 400, 19200)]
    assert {"versions", "device", "command", "attention"} <= report.keys()
    assert plot.stat().st_size > 10_000


def test_a_longer_context_needs_no_more_temporaries_than_its_table(monkeypatch, capsys):
    command = "long_context --contexts 512 4096 --output-len 1 --max-num-batched-tokens 64"
    monkeypatch.setattr(sys, "argv", command.split())
    long_context.main()
    short, long = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    ids = 4 * (4096 - 512) // 16  # bytes of the table entries of what is longer
    assert long["temporary_bytes"] - short["temporary_bytes"] <= 2 * ids  # a copy, and its rows
    assert long["scores_bytes"] > long["temporary_bytes"]  # what a matrix of scores would break


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--contexts 0", "expected a number of at least 1, got '0'"),
        ("--contexts", "expected at least one argument"),
        ("--output-len 0", "expected a number of at least 1, got '0'"),
        ("--max-num-batched-tokens x", "expected a number of at least 1, got 'x'"),
        ("--block-size 24", "invalid choice: 24"),
        ("--attention-backend fast", "invalid choice: 'fast'"),
        ("--plot nowhere/a.png", "expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    option: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["long_context", *option.split()])
    with pytest.raises(SystemExit):
        long_context.main()
    assert message in " ".join(capsys.readouterr().err.split())
