"""The benchmark of a start: fresh processes over a tiny model, medians and bars."""

import json
import pathlib
import sys

import pytest

from benchmarks import startup
from benchmarks.random_checkpoint import TINY, write_checkpoint


def start(**changes: float | None) -> dict:
    """What a process says of its start; all of it made up."""
    times = dict.fromkeys(startup.TIMES, 1.0)
    memory = {"weights_bytes": 3 * 2**20, "pool_bytes": 2**20, "peak_rss_bytes": 5 * 2**20}
    others = {"programs": 9, "lazy_compiles": 0, "others_share": 0.0, "model": "m"}
    return {**times, **memory, **others, **changes}


def test_figures_are_medians_and_are_held_against_their_bars():
    totals = (21.0, 14.0, 15.0)
    report = startup._report(
        {
            "cold": [start(start_to_first_token_s=s, import_jpaged_s=0.1) for s in totals],
            "cached": [start(start_to_first_token_s=s, import_jpaged_s=0.3) for s in (7, 5, 6.5)],
        }
    )
    assert (report["cold_s"], report["cached_s"]) == (15.0, 6.5)
    assert report["import_jpaged_s"] == 0.2  # of all six
    assert report["peak_rss_of_weights_and_pool"] == 1.25
    assert report["cold"]["seconds"] == list(totals)
    assert report["within_bar"] == {
        "cold_s": True,
        "cached_s": False,
        "import_jpaged_s": True,
        "programs": True,
        "peak_rss_of_weights_and_pool": False,
    }


def test_a_system_that_does_not_tell_its_memory_has_no_verdict(capsys):
    unknown = {"peak_rss_bytes": None, "others_share": None}
    report = startup._report({"cold": [start(**unknown)], "cached": [start(**unknown)]})
    assert report["peak_rss_of_weights_and_pool"] is None
    assert report["within_bar"]["peak_rss_of_weights_and_pool"] is None
    startup._print_table(report)
    assert "unknown" in capsys.readouterr().out


def test_every_cache_that_a_start_fills_lies_in_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("HF_HOME", raising=False)
    environment = startup.environment(tmp_path)
    assert environment["HOME"] == str(tmp_path)
    assert pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path
    assert environment["HF_HOME"] == "/home/somebody/.cache/huggingface"  # models stay


def test_two_fresh_processes_tell_every_promised_figure(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, TINY, seed=0)
    command = (
        f"startup --model {tmp_path} --repeats 1 --num-blocks 9 --max-num-seqs 1 "
        "--max-num-batched-tokens 16"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    startup.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() >= startup.BARS.keys() | {"versions", "device", "command", "model"}
    for kind in ("cold", "cached"):
        assert report[kind].keys() >= set(startup.TIMES)
    assert report["programs"] == 3  # a decode shape, a mixed one, and what copies blocks
    assert report["lazy_compiles"] == 0
    assert report["bars"] == startup.BARS


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--repeats 0", "expected a number of at least 1, got '0'"),
        ("--num-blocks 1", "--num-blocks must be at least 2"),
        ("--max-num-seqs none", "expected a number of at least 1, got 'none'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    option: str, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["startup", *option.split()])
    with pytest.raises(SystemExit):
        startup.main()
    assert message in capsys.readouterr().err
