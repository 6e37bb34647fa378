"""The check of a GPU works where there is none: its oracle, its parts at toy sizes, its command."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.gpu import correctness, decode, prefill, writes
from benchmarks.gpu.candidates import read
from benchmarks.gpu.oracle import SCALE, dense, make_ragged
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.table import part_lines
from tests.helpers import assert_close
from tests.kernels import cases

SETTINGS = Settings(backend="xla", scale="toy", seed=3, candidates=[], read_gbps=10.0)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 21, "soft_cap": 2.0}], ids=str)
def test_the_oracle_equals_the_tests_own(options: dict):
    ragged = make_ragged(
        [(1, 17), (5, 30), (7, 7)], heads=(6, 3, 16), block_size=8, dtype="float32", seed=1
    )
    case = cases.make_case([(1, 17), (5, 30), (7, 7)])
    case = cases.Case(ragged.q, ragged.pool, case.batch, list(ragged.contexts))
    assert cases.SCALE == SCALE
    expected = cases.dense(case, **options)[: len(ragged.q) - 3]
    assert_close(dense(ragged, **options), expected, 1e-12)


@pytest.mark.parametrize("module", [correctness, decode, prefill], ids=lambda m: m.__name__)
def test_a_part_records_figures_that_are_right(module):
    found: dict[str, dict] = {}
    module.run(SETTINGS, found.__setitem__)
    assert found
    assert all(result["ok"] for result in found.values()), found
    assert any("error_norm" in result for result in found.values())
    json.dumps(found)


def test_writes_are_timed_every_way_and_are_right():
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret")
    found: dict[str, dict] = {}
    writes.run(settings, found.__setitem__)
    assert {name.split()[-1] for name in found} == {
        "kernel",
        "scatter",
        "repeated",
        "xla",
        settings.backend,
    }
    assert all(result["ok"] and result["us"] > 0 for result in found.values()), found
    json.dumps(found)


def test_a_write_to_a_wrong_slot_is_found(monkeypatch: pytest.MonkeyPatch):
    right = writes.write_by_kernel
    monkeypatch.setattr(
        writes,
        "write_by_kernel",
        lambda pool, k, v, slots, **rest: right(pool, k, v, slots ^ 1, **rest),
    )
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret", only="5 bfloat16")
    found: dict[str, dict] = {}
    writes.run(settings, found.__setitem__)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.endswith("kernel")]


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    right, (decode_spec, _) = correctness.paged_decode, correctness._specs("toy")
    monkeypatch.setattr(correctness, "_specs", lambda scale: [decode_spec])
    monkeypatch.setattr(
        correctness, "paged_decode", lambda *args, **kwargs: 1.05 * right(*args, **kwargs)
    )
    found: dict[str, dict] = {}
    correctness.run(SETTINGS, found.__setitem__)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.startswith("decode")]


def test_the_command_resumes_and_fails_where_a_part_does(tmp_path: pathlib.Path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--scale", "toy", "--resume"]
    command += ["--out", str(path), "--parts", "ceiling", "--backend"]
    assert subprocess.run([*command, "xla"], check=False).returncode == 0
    report = json.loads(path.read_text())
    assert report["parts"]["ceiling"]["status"] == "done"
    report["parts"]["ceiling"]["results"]["copy"] = {"ok": False, "error": "planted"}
    path.write_text(json.dumps(report))
    assert subprocess.run([*command, "xla"], check=False).returncode == 1
    assert json.loads(path.read_text())["parts"] == report["parts"], "it ran again"


def test_a_table_shows_what_failed_and_what_is_absent():
    found = {
        "status": "done",
        "seconds": 1.0,
        "results": {
            "right": {"ok": True, "us": 4.0, "min_us": 3.9, "max_us": 4.1, "gbps": 1000.0},
            "wrong": {"ok": False, "error": "over the bound", "error_norm": 0.5},
            "absent": {"ok": True, "error": "not installed"},
        },
    }
    text = "\n".join(part_lines("decode", found))
    assert "2 ok, 1 FAILED" in text
    assert "right: 4.0 us 1000 GB/s" in text
    assert "FAILED wrong: over the bound" in text
    assert "absent: none: not installed" in text


def test_candidates_are_read_in_either_form():
    keyed = {"6/3/16": [{"tile_tokens": 32}], "9/3/64": [{"tile_tokens": 64, "num_warps": 4}]}
    listed = [{"heads": [6, 3, 16], "tile_tokens": 32}, {"query_rows": 16}]
    found = [*read(keyed), *read(listed)]
    heads = [one.pop("heads", None) for one in found]
    assert heads == [(6, 3, 16), (9, 3, 64), (6, 3, 16), None]
    assert found[1] == {"tile_tokens": 64, "num_warps": 4}


def test_ragged_rows_own_every_block_once_and_nothing_else_is_finite():
    ragged = make_ragged([(1, 9), (3, 20)], heads=(2, 1, 4), block_size=4, dtype="float16", seed=0)
    used = ragged.block_tables[ragged.block_tables > 0]
    assert len(set(used.tolist())) == len(used) == 8
    assert np.isfinite(ragged.pool.astype(np.float32)).sum() == (9 + 20) * 8
