"""The benchmark of one batch's latency, over a tiny model."""

import json
import sys

import pytest

from benchmarks import latency
from benchmarks.random_checkpoint import TINY, write_checkpoint

FIGURES = {
    f"{which}_{kind}_ms"
    for which in ("mean", "median", "p99")
    for kind in ("e2el", "ttft", "tpot", "itl")
}


@pytest.mark.parametrize("output_len", [5, 1])
def test_both_sides_have_every_promised_figure(output_len, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    write_checkpoint(tmp_path / "model", TINY, seed=0)
    plot = tmp_path / "plot.png"
    command = (
        f"latency --model {tmp_path / 'model'} --batch-size 3 --input-len 9 --output-len "
        f"{output_len} --num-iters 2 --block-size 8 --plot {plot}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    latency.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["sides"]) == ["paged", "unpaged"]
    for side in report["sides"].values():
        assert side.keys() >= FIGURES
        assert len(side["seconds"]) == 2
        assert (side["median_tpot_ms"] is None) == (output_len == 1)
    assert set(report["paged_of_unpaged"]) == {"e2el", "ttft"} | (
        {"tpot"} if output_len > 1 else set()
    )
    assert report["compiles_after_warm_up"] == 0
    assert {"versions", "device", "command", "model"} <= report.keys()
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-size 0", "expected a number of at least 1, got '0'"),
        ("--input-len x", "expected a number of at least 1, got 'x'"),
        ("--output-len 0", "expected a number of at least 1, got '0'"),
        ("--num-iters 0", "expected a number of at least 1, got '0'"),
        ("--num-iters-warmup 0", "expected a number of at least 1, got '0'"),
        ("--block-size 24", "invalid choice: 24"),
        ("--plot nowhere/a.png", "expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    option: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["latency", *option.split()])
    with pytest.raises(SystemExit):
        latency.main()
    assert message in " ".join(capsys.readouterr().err.split())
