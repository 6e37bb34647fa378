"""Tuning TPU tiles: which of those tried is taken, and what is written."""

import functools
import json
import pathlib
import sys
import types
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks import tune_tpu
from benchmarks.tables import Shape, merge
from benchmarks.tpu import trials, tuning, whole
from benchmarks.tpu.topology import missing_libtpu
from benchmarks.tpu.tuning import Tile, Tried, choose, search
from benchmarks.tune_tpu import TABLE_PATH

DECODE = Shape(kernel="decode", chip="v5e", heads=(9, 3, 64), dtype="bfloat16", block_size=16)
PREFILL = Shape(kernel="prefill", chip="v5e", heads=(9, 3, 64), dtype="bfloat16", block_size=16)
COMMAND = ["tune_tpu", "--heads", "4/2/64", "--block-sizes", "32", "--kernels", "decode", "--out"]
needs_libtpu = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")


def tried(blocks: int, time: float, *, ring: int = 3, spills: int = 0) -> Tried:
    return Tried(tile={"blocks": blocks, "ring": ring}, time=time, spills=spills)


def test_the_fastest_wins_by_more_than_a_hundredth():
    assert choose(DECODE, [tried(16, 102), tried(64, 100), tried(32, 150)]).tile["blocks"] == 64


def test_among_equals_the_smallest_tile_wins():
    assert choose(DECODE, [tried(64, 100), tried(16, 100.9), tried(32, 100.5)]).time == 100.9


def test_among_equal_rings_the_usual_one_wins():
    rings = [tried(16, 100, ring=ring) for ring in (2, 4, 3)]
    assert choose(DECODE, rings).tile["ring"] == 3
    assert choose(DECODE, [*rings, tried(16, 97, ring=4)]).tile["ring"] == 4


@pytest.mark.parametrize(
    ("time", "spills", "winner"), [(98, 300, 100), (96, 300, 96), (98, 60, 98)]
)
def test_a_small_win_does_not_pay_for_many_spills(time: float, spills: int, winner: float):
    assert choose(DECODE, [tried(16, 100), tried(64, time, spills=spills)]).time == winner


def test_a_query_tile_counts_into_a_tiles_size():
    short = Tried(tile={"tokens": 32, "blocks": 16, "ring": 3}, time=100)
    long = Tried(tile={"tokens": 64, "blocks": 16, "ring": 3}, time=99.5)
    assert choose(PREFILL, [long, short]) == short


def test_tiles_stay_within_the_bytes_of_one():
    asked: list[Tile] = []
    wide = Shape(kernel="decode", chip="v5e", heads=(32, 8, 128), dtype="bfloat16", block_size=16)
    search(wide, lambda tile: asked.append(tile) or Tried(tile=tile, time=100), lambda _: True)
    assert {tile["blocks"] * 16 for tile in asked} == {256, 512}
    assert {tile["ring"] for tile in asked} == {3, 4}


def test_what_does_not_compile_is_left_out_and_what_does_not_fit_is_given_up():
    def measure(tile: Tile) -> Tried | None:
        return None if tile["tokens"] == 128 else Tried(tile=tile, time=1000 / tile["tokens"])

    found = search(PREFILL, measure, lambda tile: tile["tokens"] == 32)
    assert found is not None
    assert found.tile["tokens"] == 32
    assert search(PREFILL, measure, lambda _: False) is None
    assert search(PREFILL, lambda _: None, lambda _: True) is None


def test_times_choose_as_estimates_do(monkeypatch: pytest.MonkeyPatch):
    def time_runs(run: Any, *arrays: Any) -> list[float]:
        del arrays
        tile = run.__wrapped__.keywords["tile"]
        if tile.blocks == 128:
            raise RuntimeError("out of VMEM")
        return [900.0, 100 + 640 / tile.blocks + 5 * tile.ring, 1.0]

    monkeypatch.setattr(trials, "time_runs", time_runs)
    monkeypatch.setattr(whole, "filled", lambda arguments: arguments)
    found = search(DECODE, functools.partial(trials.time_here, DECODE), lambda _: True)
    assert found == tried(64, 125.0, ring=3)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_what_is_timed_runs(kernel: str, monkeypatch: pytest.MonkeyPatch):
    sizes = {"CONTEXT": 64, "ROWS": 3, "QUERIES": 16}
    for name, size in sizes.items():
        monkeypatch.setattr(whole, name, size)
    tile = {"blocks": 2} if kernel == "decode" else {"blocks": 2, "tokens": 16}
    fields = {"kernel": kernel, "heads": (4, 2, 64), "dtype": "bfloat16", "block_size": 16}
    call, arguments = whole.plain(**fields, tile=tile, interpret=True)
    out = call(*whole.filled(arguments))
    assert out.shape == arguments[0].shape
    assert jnp.isfinite(out).all()
    assert (out != 0).any()


def test_entries_are_merged_in_order_and_times_stay(tmp_path: pathlib.Path):
    path = tmp_path / "tiles.json"
    timed, estimated = ({"source": source} for source in ("wall time", "compiler estimate"))
    merge(path, {"c": estimated, "a": timed})
    merge(path, {"b": estimated, "a": estimated, "c": timed})
    assert json.loads(path.read_text()) == {"a": timed, "b": estimated, "c": timed}
    assert [line[2] for line in path.read_text().splitlines()[1:-1]] == ["a", "b", "c"]


def test_the_shipped_table_is_as_it_would_be_written(tmp_path: pathlib.Path):
    path = tmp_path / "tiles.json"
    path.write_text(TABLE_PATH.read_text())
    merge(path, {})
    assert path.read_text() == TABLE_PATH.read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--dtypes=foo", "invalid choice: 'foo'"), ("--block-sizes=12", "expected a multiple of 8")],
)
def test_what_no_kernel_takes_is_refused(
    option: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["tune_tpu", option])
    with pytest.raises(SystemExit):
        tune_tpu.main()
    assert message in capsys.readouterr().err


@needs_libtpu
def test_the_command_adds_an_estimate_to_a_table(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "tiles.json"
    path.write_text('{"other": {"source": "wall time"}}')
    monkeypatch.setattr(tuning, "DECODE_TOKENS", (512,))
    monkeypatch.setattr(tuning, "RINGS", (3,))
    monkeypatch.setattr(sys, "argv", [*COMMAND, str(path), "--chips", "v5e"])
    tune_tpu.main()
    table = json.loads(path.read_text())
    entry = table["decode v5e 4/2/64 bfloat16 32"]
    assert entry["tile"] == {"blocks": 16, "ring": 3}
    assert entry["source"] == "compiler estimate"
    assert entry["cycles"] >= round(512 * 2 * 2 * 64 * 2 / 546)
    assert "other" in table


@needs_libtpu  # whose version is noted
def test_where_a_tpu_is_at_hand_the_command_takes_times(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tune_tpu.jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    monkeypatch.setattr(tune_tpu, "target_chip", lambda: "v4")
    monkeypatch.setattr(tune_tpu, "time_here", lambda _, tile: Tried(tile=tile, time=7.5))
    monkeypatch.setattr(tune_tpu, "compiles_here", lambda *_: True)
    monkeypatch.setattr(sys, "argv", [*COMMAND, str(path)])
    tune_tpu.main()
    entry = json.loads(path.read_text())["decode v4 4/2/64 bfloat16 32"]
    assert (entry["source"], entry["us"], "cycles" in entry) == ("wall time", 7.5, False)
    monkeypatch.setattr(sys, "argv", [*COMMAND, str(path), "--chips", "v5e"])
    with pytest.raises(SystemExit, match="the TPU at hand, v4"):
        tune_tpu.main()
