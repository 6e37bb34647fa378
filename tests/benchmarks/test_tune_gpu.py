"""Tuning GPU tiles: what is tried, what is kept, what is taken, and what is written."""

import json
import pathlib
import sys
import types
from typing import Any

import jax
import pytest

from benchmarks import tune_gpu
from benchmarks.aot import ROOT
from benchmarks.gpu import candidates, decode, prefill, timing, trials
from benchmarks.gpu.builds import ATTENTION
from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.topology import missing_cuda
from benchmarks.gpu.tuning import (
    ENOUGH_BYTES,
    KEPT,
    Cut,
    Tried,
    bytes_in_flight,
    choose,
    distance,
    fits,
    list_cuts,
    rank,
)
from benchmarks.tables import Shape, merge
from benchmarks.tune_gpu import TABLE_PATH, make_entry
from pallas_kernels.gpu.tiles import read_table

DECODE = Shape(kernel="decode", chip="sm_90a", heads=(9, 3, 64), dtype="bfloat16", block_size=16)
PREFILL = Shape(kernel="prefill", chip="sm_89", heads=(32, 8, 128), dtype="bfloat16", block_size=16)
CUT = {"tile_tokens": 64, "split_tokens": 256, "num_warps": 4, "num_stages": 3, "num_programs": 9}
COMMAND = ["tune_gpu", "--heads", "4/2/64", "--block-sizes", "32", "--kernels", "decode"]
NAME = "decode sm_90a 4/2/64 bfloat16 32"
RESULTS = sorted((ROOT / "benchmarks/results").glob("*h100*candidates.json"))
needs_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


def tried(resident: int = 4, **fields: int) -> Tried:
    return Tried(cut=CUT | fields, registers=96, shared_bytes=40_000, resident=resident)


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=str)
def test_the_formulas_cut_comes_first_and_every_cut_is_one_its_kernel_takes(shape: Shape):
    ours = trials.formula(shape)
    cuts = list_cuts(shape, ours)
    assert cuts[0] == ours
    assert len({tuple(cut.items()) for cut in cuts}) == len(cuts) > 30
    for cut in cuts:
        ATTENTION[shape.kernel].config_class(**cut)


def test_a_query_tile_has_room_for_every_head():
    wide = Shape(**{**vars(PREFILL), "heads": (128, 1, 64)})
    assert {cut["query_rows"] for cut in list_cuts(wide, trials.formula(wide))} == {128, 256}


def test_the_formula_is_that_of_the_chip():
    assert trials.formula(PREFILL)["num_stages"] == 2
    assert trials.formula(Shape(**{**vars(PREFILL), "chip": "sm_80"}))["num_stages"] == 3


def test_bytes_in_flight_are_those_of_all_programs_and_of_all_tiles_but_the_one_at_hand():
    assert bytes_in_flight(DECODE, tried(resident=3, num_stages=4)) == 3 * 3 * 64 * 2 * 64 * 2
    padded = Shape(**{**vars(DECODE), "heads": (8, 2, 80)})
    assert bytes_in_flight(padded, tried(resident=3)) == 3 * 2 * 64 * 2 * 128 * 2


def test_cuts_with_too_few_bytes_in_flight_come_last_and_the_nearest_first():
    far, near = tried(num_warps=16, num_stages=4), tried(num_warps=8)
    few = tried(resident=1, num_stages=2)
    assert bytes_in_flight(DECODE, few) < ENOUGH_BYTES < bytes_in_flight(DECODE, far)
    ranked = [one.cut for one in rank(DECODE, CUT, [few, far, tried(), near])]
    assert CUT not in ranked
    assert ranked.index(near.cut) < ranked.index(far.cut) < ranked.index(few.cut)
    assert {cut["split_tokens"] for cut in ranked} == {128, 256, 512}


def test_a_split_is_whole_tiles():
    splits = [one.cut["split_tokens"] for one in rank(DECODE, CUT, [tried(tile_tokens=256)])]
    assert splits == [256, 512]


def test_a_prompts_cuts_are_ranked_as_they_are():
    cut = {"query_rows": 128, "context_tokens": 64, "num_warps": 8, "num_stages": 2}
    other = Tried(cut=cut | {"num_warps": 4}, registers=200, shared_bytes=0, resident=2)
    assert rank(PREFILL, cut, [other]) == [other]


def test_a_distance_is_in_doublings_and_stages():
    assert distance(CUT, CUT) == 0
    assert distance(CUT | {"tile_tokens": 16, "num_stages": 4, "split_tokens": 512}, CUT) == 4


def test_what_spills_or_is_larger_than_the_chip_does_not_fit():
    assert fits(PREFILL, spilled_bytes=0, shared_bytes=99 << 10)
    assert not fits(PREFILL, spilled_bytes=0, shared_bytes=(99 << 10) + 1)
    assert not fits(PREFILL, spilled_bytes=4, shared_bytes=0)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ([90.0, 10.0], "cut"),  # 5 % in the mean
        ([97.0, 10.0], "formula"),  # 1.5 %
        ([50.0, 10.4], "formula"),  # far faster, but not everywhere
        ([50.0, 10.2], "cut"),
        ([1.0], "formula"),  # wrong at the other shape
    ],
)
def test_a_cut_must_be_faster_in_the_mean_and_slower_nowhere(times: list[float], winner: str):
    named = {f"shape {place}": us for place, us in enumerate(times)}
    ours = {"shape 0": 100.0, "shape 1": 10.0}
    assert choose({"formula": ours, "cut": named}, "formula") == winner


def test_nothing_is_taken_where_the_formulas_own_cut_failed():
    with pytest.raises(ValueError, match="own cut failed"):
        choose({"cut": {"a": 1.0}}, "formula")


def test_of_cuts_that_are_better_the_fastest_is_taken():
    times = {name: {"a": us} for name, us in [("formula", 9.0), ("x", 7.0), ("y", 6.0), ("z", 8.0)]}
    assert choose(times, "formula") == "y"


def test_an_entry_has_both_times_and_where_the_formula_stays_there_is_none():
    ours, best = "tile_tokens=64 num_warps=4", "tile_tokens=32 num_warps=2"
    times = {ours: {"a": 10.0, "b": 40.0}, best: {"a": 8.0, "b": 32.0}}
    entry = make_entry({"tile_tokens": 64, "num_warps": 4}, times)
    assert entry is not None
    assert entry["config"] == {"tile_tokens": 32, "num_warps": 2}
    assert (entry["us"], entry["formula_us"], entry["source"]) == (16.0, 20.0, "wall time")
    assert make_entry({"tile_tokens": 32, "num_warps": 2}, times) is None


def test_an_entry_can_be_taken_out(tmp_path: pathlib.Path):
    path = tmp_path / "tiles.json"
    merge(path, {"a": {"source": "wall time"}, "b": {"source": "wall time"}})
    merge(path, {"a": None, "c": None})
    assert json.loads(path.read_text()) == {"b": {"source": "wall time"}}
    merge(path, {"b": None})
    assert json.loads(path.read_text()) == {}


def test_the_shipped_table_is_as_it_would_be_written(tmp_path: pathlib.Path):
    path = tmp_path / "tiles.json"
    path.write_text(TABLE_PATH.read_text())
    merge(path, {})
    assert path.read_text() == TABLE_PATH.read_text()


def measured(path: pathlib.Path) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Times of a results file by kernel and heads, cut and shape; a prompt's in one loop alone."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    results = json.loads(path.read_text())["parts"]["candidates"]["results"]
    for name, result in results.items():
        kernel, heads, shape = name.split(" ", 2)
        times = found.setdefault((kernel, heads), {})
        for cut, us in result["all_us"].items():
            if cut != "default" and "num_loops=2" not in cut:
                times.setdefault(cut.removesuffix(" num_loops=1"), {})[shape] = us
    return found


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_table_is_what_was_measured_on_an_h100(path: pathlib.Path):
    """Where the formula's cut was among the candidates: each key in one of the two files."""
    for (kernel, heads), times in measured(path).items():
        N, K, H = map(int, heads.split("/"))
        fields = {"heads": (N, K, H), "dtype": "bfloat16", "block_size": 16}
        shape = Shape(kernel=kernel, chip="sm_90a", **fields)
        ours = candidates.cut_name(trials.formula(shape))
        if ours not in times:
            continue
        best = choose(times, ours)
        entry = read_table().get(Shape(kernel=kernel, chip="H100", **fields).name)
        assert best == (ours if entry is None else candidates.cut_name(entry["config"]))


def test_every_h100_key_that_was_measured_has_its_formula_among_the_candidates():
    keys = {
        (kernel, heads)
        for path in RESULTS
        for (kernel, heads), times in measured(path).items()
        if any(candidates.cut_name(formula_of(kernel, heads)) == cut for cut in times)
    }
    heads = ("14/2/64", "32/8/128", "9/3/64")
    assert keys == {("decode", each) for each in heads} | {("prefill", each) for each in heads[1:]}


def formula_of(kernel: str, heads: str) -> Cut:
    N, K, H = map(int, heads.split("/"))
    fields = {"heads": (N, K, H), "dtype": "bfloat16", "block_size": 16}
    return trials.formula(Shape(kernel=kernel, chip="sm_90a", **fields))


def test_survivors_are_candidates_of_their_own_chip_and_of_the_shapes_that_are_timed():
    survivor = {**CUT, "compiled": {"registers": 96}}
    content = {
        "decode sm_90a 9/3/64 bfloat16 16": {"tried": 3, "survivors": [survivor]},
        "decode sm_80 32/8/128 bfloat16 16": {"survivors": [survivor]},
        "decode sm_90a 32/8/128 float32 16": {"survivors": [survivor]},
        "decode sm_90a 32/8/128 bfloat16 64": {"survivors": [survivor]},
    }
    assert list(candidates.read(content, chip="sm_90a")) == [{**CUT, "heads": (9, 3, 64)}]
    assert list(candidates.read(content)) == []


def test_candidates_are_timed_beside_the_default(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "TARGET_S", 0.0)  # interpreted, every call takes long
    monkeypatch.setattr(decode, "_calls", lambda *_: 1)
    monkeypatch.setattr(prefill, "DEFAULT_CALLS", 1)
    path = tmp_path / "candidates.json"
    cut = {"tile_tokens": 16, "split_tokens": 16, "num_warps": 2}
    prompt = {"query_rows": 16, "context_tokens": 16, "num_warps": 2}
    path.write_text(json.dumps({"6/3/16": [cut, prompt], "9/3/64": [{"tile_tokens": 32}]}))
    settings = Settings(
        backend="pallas-gpu-interpret", scale="toy", seed=1, candidates=[str(path)], read_gbps=None
    )
    record = Record()
    found = record.results
    candidates.run(settings, record)
    assert list(found) == ["decode 6/3/16 3 x 40", "prefill 6/3/16 2 x 12 of 40"]
    for result, fields in zip(found.values(), (cut, prompt), strict=True):
        assert result["ok"]
        assert set(result["all_us"]) == {"default", candidates.cut_name(fields)}
        assert result["failed"] == {}


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, pathlib.Path]:
    """The command's two files; compiling and timing only say what they were asked."""
    files = {"survivors": tmp_path / "survivors.json", "table": tmp_path / "tiles.json"}
    own = ["--survivors", str(files["survivors"]), "--out", str(files["table"])]
    monkeypatch.setattr(sys, "argv", [*COMMAND, *own])
    monkeypatch.setattr(tune_gpu, "missing_cuda", lambda: None)
    return files


def fake_survivors(shape: Shape) -> dict[str, Any]:
    better = trials.formula(shape) | {"num_warps": 2, "compiled": {"registers": 9}}
    record = {"formula": trials.formula(shape), "tried": 3, "survivors": [better]}
    return {**record, "jax": jax.__version__}


def test_without_a_gpu_survivors_are_written_for_every_chip_and_no_table(
    files: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(
        tune_gpu, "find_survivors", lambda shape: asked.append(shape.name) or fake_survivors(shape)
    )
    tune_gpu.main()
    assert sorted(json.loads(files["survivors"].read_text())) == sorted(asked)
    assert [name.split()[1] for name in asked] == ["sm_80", "sm_89", "sm_90a"]
    assert not files["table"].exists()
    tune_gpu.main()
    assert len(asked) == 3, "what the file has is compiled again"
    monkeypatch.setattr(tune_gpu, "missing_cuda", lambda: "there is no compiler")
    tune_gpu.main()
    records = json.loads(files["survivors"].read_text())
    records[NAME]["jax"] = "0.1"
    files["survivors"].write_text(json.dumps(records))
    with pytest.raises(SystemExit, match=f"{NAME} is not in .*, and there is no compiler"):
        tune_gpu.main()
    monkeypatch.setattr(tune_gpu, "missing_cuda", lambda: None)
    tune_gpu.main()
    assert asked[3:] == [NAME], "another version's survivors are taken for this one's"


def test_on_a_gpu_survivors_are_timed_once_and_the_table_has_what_is_better(
    files: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    timed: list[list[Cut]] = []

    def time_cuts(shape: Shape, cuts: list[Cut], *, seed: int) -> dict[str, dict[str, float]]:
        del seed
        timed.append(cuts)
        assert shape.name == NAME
        return {candidates.cut_name(cut): {"a": 5.0 * cut["num_warps"]} for cut in cuts}

    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 PCIe")
    monkeypatch.setattr(tune_gpu.jax, "devices", lambda: [device])
    monkeypatch.setattr(tune_gpu, "chip_here", lambda: "sm_90a")
    monkeypatch.setattr(tune_gpu, "find_survivors", fake_survivors)
    monkeypatch.setattr(tune_gpu, "time_cuts", time_cuts)
    older = {"config": {**CUT, "num_warps": 8}, "source": "wall time"}
    files["table"].write_text(json.dumps({"decode H100 4/2/64 bfloat16 32": older, "b": older}))
    tune_gpu.main()
    table = json.loads(files["table"].read_text())
    assert list(table) == ["b", "decode H100 4/2/64 bfloat16 32"]
    entry = table["decode H100 4/2/64 bfloat16 32"]
    assert entry["config"]["num_warps"] == 2
    assert (entry["us"], entry["formula_us"]) == (10.0, 20.0)
    assert older["config"] in timed[0]
    tune_gpu.main()
    assert len(timed) == 1, "what the file has is timed again"
    records = json.loads(files["survivors"].read_text())
    records[NAME] |= {"jax": "0.1", "times": {"NVIDIA H100 PCIe, JAX 0.1": {}}}
    files["survivors"].write_text(json.dumps(records))
    monkeypatch.setattr(tune_gpu, "missing_cuda", lambda: "there is no compiler")
    tune_gpu.main()
    assert timed[1][:2] == timed[0][:2], "another version's survivors are timed here"
    times = json.loads(files["survivors"].read_text())[NAME]["times"]
    assert list(times) == [
        "NVIDIA H100 PCIe, JAX 0.1",
        f"NVIDIA H100 PCIe, JAX {jax.__version__}",
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--chips", "sm_80"])
    with pytest.raises(SystemExit, match="the GPU at hand, sm_90a"):
        tune_gpu.main()


@needs_compiler
def test_the_command_keeps_a_few_cuts_that_compile(
    files: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.gpu.tuning.TILE_TOKENS", (64, 128))
    monkeypatch.setattr("benchmarks.gpu.tuning.DECODE_WARPS", (1, 4))
    monkeypatch.setattr("benchmarks.gpu.tuning.STAGES", (2, 9))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--chips", "sm_90a", "--heads", "4/2/128"])
    tune_gpu.main()
    record = json.loads(files["survivors"].read_text())[NAME.replace("64", "128")]
    assert record["tried"] == 9
    assert record["spilled"] >= 1
    assert record["too_large"] >= 1
    assert 1 <= len(record["survivors"]) <= KEPT
    for survivor in record["survivors"]:
        assert survivor["num_stages"] in (2, 3)
        assert survivor["compiled"]["resident"] >= 1
