"""The serving benchmark over a tiny model: equal bytes, promised figures, refused arguments."""

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving_sim
from benchmarks.arrivals import Arrival, Trace
from benchmarks.lengths import RequestLengths
from benchmarks.random_checkpoint import TINY, write_checkpoint
from benchmarks.serving_metrics import Objective
from benchmarks.serving_sides import equal_blocks

COMMAND = (
    "serving_sim --model {model} --requests 10 --rates 200 --length-scale 0.02 --max-input 40 "
    "--max-output 20 --rows 2 --reserved 96 --max-num-seqs 8 --max-num-batched-tokens 64 "
    "--block-size 8 --unpaged unpaged unpaged-tight unpaged-refilled --plot {plot}"
)
FIGURES = {
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "request_goodput",
    "users_at_once_mean",
    "users_at_once_peak",
    *(
        f"{which}_{kind}_ms"
        for which in ("mean", "median", "p99")
        for kind in ("ttft", "tpot", "itl", "e2el", "queue")
    ),
}


def report_of(command: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", command.split())
    serving_sim.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_side_has_the_same_bytes_and_every_promised_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    write_checkpoint(tmp_path / "model", TINY, seed=0)
    plot = tmp_path / "plot.png"
    command = COMMAND.format(model=tmp_path / "model", plot=plot)
    report = report_of(command, monkeypatch, capsys)
    sides = report["sides"]
    assert list(sides) == ["paged", "unpaged", "unpaged-tight", "unpaged-refilled"]
    assert sides["unpaged"]["rows"] == 2
    assert sides["unpaged-tight"]["rows"] == 2 * 96 // 60
    assert sides["paged"]["cache_mib"] == sides["unpaged"]["cache_mib"]
    assert sides["unpaged-tight"]["cache_mib"] <= sides["paged"]["cache_mib"]
    for side in sides.values():
        (result,) = side["results"]
        assert result.keys() >= FIGURES
        assert result["completed"] == 10
        assert result["total_output_tokens"] == report["output_tokens"]
        assert result["total_input_tokens"] == report["prompt_tokens"]
    assert sides["unpaged"]["results"][0]["users_at_once_peak"] <= 2
    assert report["compiles_after_warm_up"] == 0
    assert report["objective"] == {"p99_ttft_ms": 5000, "p99_itl_ms": 1000}
    assert {"versions", "device", "command", "model"} <= report.keys()
    assert plot.stat().st_size > 10_000


def test_a_search_measures_no_rate_twice_and_finds_what_each_side_serves(monkeypatch):
    limits = {"paged": 6.0, "unpaged": 1.4}
    measured: list[tuple[str, float]] = []

    def serve(name: str, arrivals: list[Arrival], _: object) -> tuple[str, float]:
        measured.append((name, 1 / arrivals[1].seconds))
        return measured[-1]

    def metrics(run: tuple[str, float], _: object) -> dict[str, float]:
        name, rate = run
        found = dict.fromkeys(("median_ttft_ms", "p99_ttft_ms", "p99_itl_ms", "p99_queue_ms"), 1.0)
        found |= dict.fromkeys(("request_goodput", "output_throughput", "users_at_once_mean"), 1.0)
        found |= {"users_at_once_peak": 1, "p99_ttft_ms": 1.0 if rate < limits[name] else 9.0}
        return found

    monkeypatch.setattr(serving_sim, "replay", serve)
    monkeypatch.setattr(serving_sim, "serving_metrics", metrics)
    trace = Trace(times=[0.0, 1.0], lengths=[RequestLengths(input_tokens=2, output_tokens=2)] * 2)
    results = serving_sim._measure(
        argparse.Namespace(rates=[0.5, 1.0], search=True, bisections=2),
        trace,
        [[3, 4]] * 2,
        [named(name) for name in limits],
        Objective(ttft_ms=2, itl_ms=2),
    )
    assert measured[:4] == [("paged", 0.5), ("unpaged", 0.5), ("paged", 1.0), ("unpaged", 1.0)]
    assert len(measured) == len(set(measured))
    highest = {name: serving_sim._highest(found) for name, found in results.items()}
    assert highest == pytest.approx({"paged": 4 * 2**0.5, "unpaged": 2**0.25})


def named(name: str) -> Any:
    """A side whose server is its name."""
    return SimpleNamespace(name=name, start=lambda: name)


def test_a_trace_that_is_too_short_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,5,6\n1,7,8\n")
    monkeypatch.setattr(sys, "argv", f"serving_sim --trace {path} --requests 3".split())
    with pytest.raises(SystemExit, match="has 2 requests, 3 from number 0 on were asked for"):
        serving_sim.main()


def test_blocks_hold_exactly_what_the_rows_reserve():
    assert equal_blocks(4, 2048, 16) == 512
    assert equal_blocks(3, 40, 8) == 15
    for rows, reserved, block_size in ((3, 50, 16), (1, 8, 16)):
        with pytest.raises(ValueError, match="no whole number of blocks of 16"):
            equal_blocks(rows, reserved, block_size)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rates 0", "expected a finite number above 0, got '0'"),
        ("--rates nan", "expected a finite number above 0, got 'nan'"),
        ("--requests 1", "--requests must be at least 2"),
        ("--trace nowhere.csv", "there is no file 'nowhere.csv'"),
        ("--lengths alpaca", "a file that exists or one of sharegpt, azure-conv"),
        ("--first 3", "--first passes over requests of a trace"),
        ("--shared-prefix -1", "expected a number of at least 0, got '-1'"),
        ("--reserved 500", "must hold --max-input and --max-output together, 768 tokens"),
        ("--rows 3 --reserved 1000", "no whole number of blocks of 16"),
        ("--unpaged orca", "invalid choice: 'orca'"),
        ("--attention-backend metal", "invalid choice: 'metal'"),
        ("--ttft-ms 0", "expected a finite number above 0, got '0'"),
        ("--plot nowhere/a.png", "expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    option: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["serving_sim", *option.split()])
    with pytest.raises(SystemExit):
        serving_sim.main()
    assert message in " ".join(capsys.readouterr().err.split())
