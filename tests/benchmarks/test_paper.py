"""The paper's figures over a tiny model: equal bytes, promised fields, refused arguments."""

import json
import sys

import pytest

from benchmarks.open_loop import Replay, Served
from benchmarks.paper import __main__ as paper
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.options import parse_options
from benchmarks.paper.points import LATENCY, _middle
from benchmarks.random_checkpoint import TINY, write_checkpoint
from benchmarks.serving_metrics import run_metrics

COMMAND = (
    "paper {figure} --model {model} --requests 6 --rates 2000 3000 --repeats 1 --rows 2 "
    "--reserved 64 --max-input 10 --max-output 20 --max-num-seqs 6 --max-num-batched-tokens 32 "
)


def report_of(figure: str, special: str, tmp_path, monkeypatch, capsys) -> dict:
    """The JSON line of a figure, after what holds for each of them."""
    write_checkpoint(tmp_path / "model", TINY, seed=0)
    command = COMMAND.format(figure=figure, model=tmp_path / "model") + special
    monkeypatch.setattr(sys, "argv", command.split())
    paper.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["benchmark"], report["figure"]) == ("paper", figure)
    assert {"versions", "device", "command", "model"} <= report.keys()
    assert report["compiles_after_warm_up"] == 0
    assert [point["request_rate"] for point in report["points"]] == sorted(
        report["rates"] * (len(report["points"]) // 2)
    )
    assert len({point["cache_mib"] for point in report["points"]}) == 1
    for point in report["points"]:
        assert point["completed"] == 6
        assert point[LATENCY] > 0
        assert point[f"each_{LATENCY}"] == [point[LATENCY]]
    return report


def of_side(report: dict, side: str) -> list[dict]:
    """The points of one side."""
    return [point for point in report["points"] if point["side"] == side]


def test_latency_has_the_engine_beside_every_baseline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    report = report_of("latency", f"--block-size 8 --plot {plot}", tmp_path, monkeypatch, capsys)
    assert [(point["side"], point["request_rate"]) for point in report["points"]] == [
        (side, rate) for rate in (2000, 3000) for side in ("paged", "unpaged", "unpaged-refilled")
    ]
    assert len({point["total_output_tokens"] for point in report["points"]}) == 1
    assert all(point["users_at_once_peak"] <= 2 for point in of_side(report, "unpaged"))
    assert plot.stat().st_size > 10_000


def test_only_the_prefix_cache_finds_the_shared_prefix(tmp_path, monkeypatch, capsys):
    special = "--block-size 8 --prefixes 16 32"
    report = report_of("shared-prefix", special, tmp_path, monkeypatch, capsys)
    assert len(report["points"]) == 2 * 2 * 2
    for point in of_side(report, "prefix cache"):
        num_shared = int(point["panel"].split()[2])
        # Those that start in one step with the first cannot find what it has yet to compute.
        assert 0 < point["hit_tokens"] <= 5 * (num_shared + 8)
        assert point["hit_tokens"] % 8 == 0
    for point in of_side(report, "no prefix cache"):
        assert point["hit_tokens"] == 0


def test_later_rounds_of_a_chat_are_found_in_the_prefix_cache(tmp_path, monkeypatch, capsys):
    # So seldom that a round has been answered when the next one comes.
    special = "--block-size 8 --rounds 2 --history 40 --length-scale 0.1 --rates 4 5"
    report = report_of("chat", special, tmp_path, monkeypatch, capsys)
    assert [point["side"] for point in report["points"]] == ["prefix cache", "no prefix cache"] * 2
    assert all(point["hit_tokens"] > 0 for point in of_side(report, "prefix cache"))
    assert all(point["hit_tokens"] == 0 for point in of_side(report, "no prefix cache"))


def test_every_block_size_serves_the_same_requests(tmp_path, monkeypatch, capsys):
    report = report_of("block-size", "--block-sizes 8 32", tmp_path, monkeypatch, capsys)
    assert [point["block_size"] for point in report["points"]] == [8, 32] * 2
    assert len({point["total_output_tokens"] for point in report["points"]}) == 1
    assert all(point["swapped_out_blocks"] == 0 for point in report["points"])


def test_what_does_not_fit_is_swapped_or_computed_again(tmp_path, monkeypatch, capsys):
    special = "--block-sizes 8 --rows 1 --reserved 32 --swap-space 0.01"  # the last one counts
    report = report_of("swap", special, tmp_path, monkeypatch, capsys)
    for point in of_side(report, "recomputing"):
        assert point["preemptions"] > 0
        assert point["swapped_out_blocks"] == 0
    for point in of_side(report, "swapping"):
        assert point["preemptions"] > 0
        assert point["swapped_out_blocks"] > 0


def test_normalised_latency_is_a_mean_over_requests_not_tokens():
    served = [
        Served(arrival=1.0, num_prompt=3, start=1.0, token_ids=[5], token_times=[3.0]),
        Served(arrival=2.0, num_prompt=4, start=2.5, token_ids=[6] * 4, token_times=[3, 4, 5, 6]),
    ]
    run = Replay(served=served, held=[(5.0, 2)], seconds=6.0)
    assert run_metrics(run)[LATENCY] == pytest.approx(1e3 * (2 / 1 + 4 / 4) / 2)


@pytest.mark.parametrize(("latencies", "middle"), [([3, 1, 2], 2), ([4, 1, 3, 2], 2), ([5], 5)])
def test_a_point_is_the_middle_run_as_a_whole(latencies: list[int], middle: int):
    point = _middle([{LATENCY: latency, "duration": 10 * latency} for latency in latencies])
    assert point == {
        LATENCY: middle,
        "duration": 10 * middle,
        f"each_{LATENCY}": latencies,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("figure-12", "invalid choice: 'figure-12'"),
        ("latency --rates 0", "expected a finite number above 0, got '0'"),
        ("latency --requests 1", "--requests must be at least 2"),
        ("chat --history 1000", "must hold the longest prompt and answer together, 1048 tokens"),
        ("block-size --block-sizes 24", "invalid choice: 24"),
        ("block-size --rows 3 --reserved 264", "no whole number of blocks of 16"),
        ("latency swap --rounds 3", "--rounds is an option of chat; got latency swap"),
        ("chat --block-sizes 8", "--block-sizes is an option of block-size, swap; got chat"),
        ("swap --swap-space 0", "expected a finite number above 0, got '0'"),
        ("shared-prefix --plot nowhere/a.png", "expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    arguments: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["paper", *arguments.split()])
    with pytest.raises(SystemExit):
        paper.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_figure_has_defaults_of_its_own_and_they_can_be_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper", *FIGURES])
    each = parse_options(None, FIGURES)
    assert list(each) == list(FIGURES)
    for name, options in each.items():
        missing = {key for key in FIGURES[name].defaults if getattr(options, key) is None}
        assert not missing
