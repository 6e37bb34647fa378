"""The benchmark of one decode step: what its command line refuses."""

import sys

import pytest

from benchmarks import step


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--repetition-penalty 0", "repetition_penalty must be from"),
        ("--repetition-penalty nan", "repetition_penalty must be finite, got nan"),
        ("--repetition-penalty high", "could not convert string to float: 'high'"),
        ("--block-size 24", "invalid choice: 24"),
        ("--batches 0", "expected a number of at least 1, got '0'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["step", *option.split()])
    with pytest.raises(SystemExit):
        step.main()
    assert message in capsys.readouterr().err
