"""Estimates of TPU kernels: the compiler's dumps are read right, and a row has its figures."""

import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest

from benchmarks import tpu_static
from benchmarks.aot import failure_reason
from benchmarks.tpu import rows
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.estimate import read_kernel
from benchmarks.tpu.probe import Work
from benchmarks.tpu.rows import _times, estimate_row, make_rows
from benchmarks.tpu.static_table import row_line
from benchmarks.tpu.topology import missing_libtpu

USE = """\
== CAPACTIY:
MATMUL, VALU, VLOAD:FILL, VSTORE:SPILL, SALU
    2     4     3     2     2
== UTILIZATION:
0 0 0 0 1
0 1 0 1 2
1 4 2 0 0
1 3 0 1 0
0 0 1 0 0
"""
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %10 = vsyncpa [#allocation9], 0 }
   0x1   :  { %20 = dma.hbm_to_smem /*hbm=*/%s1, /*window
base_bounds: (1, 1, 16)
second_minor_factor: 1 */ }
   0x2 LB: > { %v2 = vld [vmem:[%s3] sm:$0xff]  ;;  %s4 = sadd.s32 1, %s5 }
   0x3   : > { %329 = sbr.rel (!%p6339_p3) target = $region182 }
   0x4 LE:  { %5871 = vsyncpa [#allocation9], 1 }
"""
KEPT = "v5e 9/3/64 context 1024 decode"
needs_libtpu = pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")


def test_a_loop_is_told_from_what_stands_around_it():
    kernel = read_kernel(USE, BUNDLES)
    assert (kernel.whole.bundles, kernel.turn.bundles) == (5, 2)
    assert (kernel.whole.spills, kernel.whole.fills) == (2, 3)
    assert kernel.turn.use("VALU") == 7 / 8
    assert kernel.turn.use("MATMUL") == 2 / 4


def test_a_kernel_without_a_loop_is_its_own_turn():
    kernel = read_kernel(USE, BUNDLES.replace("> {", "{"))
    assert kernel.turn == kernel.whole


def test_the_loop_that_multiplies_counts_though_another_one_is_longer():
    bundles = BUNDLES + "   0x5   : >> { %1 }\n" * 3
    kernel = read_kernel(USE + "0 4 0 0 2\n" * 3, bundles)
    assert (kernel.turn.used["MATMUL"], kernel.turn.bundles) == (2, 2)
    # Where only what is in no loop multiplies, a loop of one turn was unrolled.
    outside = USE.replace("1 4 2 0 0\n1 3", "0 4 2 0 0\n0 3").replace("0 0 0 0 1", "1 0 0 0 1")
    kernel = read_kernel(outside, BUNDLES)
    assert (kernel.turn.used["MATMUL"], kernel.turn.bundles) == (1, 3)


def test_a_tile_among_many_does_not_pay_for_the_first_copies():
    work = Work(rows=2, tiles=8, kv_bytes=8 * 9370, ideal_bytes=8 * 9370, flops=0)
    figures = _times(160, 12.5, work, CHIPS["v6e"])
    assert (figures["roof"], figures["steady_roof"]) == (0.5, 0.8)
    assert _times(160, 3, work, CHIPS["v6e"])["steady_roof"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "prefill", "--contexts", "2048"], "no probe has 2048; prefill has 4096"),
        (["--heads", "7/3/64"], "query heads must be a multiple of KV heads, got 7 and 3"),
        (["--heads", "a/b/c"], "expected N/K/H"),
        (["--heads", "4/0/64"], "expected N/K/H"),
    ],
)
def test_what_no_row_could_be_of_is_refused(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["tpu_static", *arguments])
    with pytest.raises(SystemExit):
        tpu_static.main()
    assert message in capsys.readouterr().err


@needs_libtpu  # whose version is noted
def test_rows_that_are_kept_say_where_they_are_from(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "found.json"
    kept = {"chip": "v5e", "heads": [9, 3, 64], "context": 1024, "probe": "decode", "reason": "no"}
    of_before = {"commit": "abc", "versions": {"jax": "0.1"}, "rows": {KEPT: kept}}
    path.write_text(json.dumps(of_before))
    monkeypatch.setattr(tpu_static, "estimate_row", lambda row, timeout: kept | {"why": timeout})
    command = ["tpu_static", "--chips", "v5e", "--heads", "9/3/64", "--probes", "decode"]
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "--out", str(path)])
    tpu_static.main()
    report = json.loads(path.read_text())
    new = report["rows"].pop(KEPT.replace("1024", "4096"))
    assert report["rows"][KEPT] == kept | {"commit": "abc", "jax": "0.1"}
    assert {"commit", "date", "jax", "libtpu", "command"} <= new.keys()
    assert new["commit"] != "abc"
    assert set(report) == {"benchmark", "kind", "rows"}


def test_dumps_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="zip"):
        read_kernel(USE + "0 0 0 0 0\n", BUNDLES)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "F1126 20:01:02.000001  77 stream.cc:12] Check failed: ok (a/b.cc:3) no\n*** Check\n",
            "the compiler aborts: Check failed: ok (a/b.cc:3) no",
        ),
        (
            "Traceback:\n  raise\nValueError: not at /home/someone/kernel.py:3\nHint.\n",
            "ValueError: not at kernel.py:3",
        ),
        ('  File "/x/kernel.py", line 9, in body\nAssertionError\n', "AssertionError in body"),
        ("", "exit status -6"),
    ],
    ids=["abort", "exception", "no-message", "silence"],
)
def test_a_failure_is_one_line_without_this_machines_folders(stderr: str, reason: str):
    assert failure_reason(stderr, -6) == reason


def test_cycles_that_do_not_grow_are_no_figures(monkeypatch: pytest.MonkeyPatch):
    def estimate_for_tpu(target: str, *, chip: str, options: dict[str, Any], timeout: int):
        del target, chip, timeout
        work = Work(rows=1, tiles=options["context"] // 256, kv_bytes=1, ideal_bytes=1, flops=1)
        compiled = types.SimpleNamespace(extra=[work, {}], compile_seconds=1.0)
        return types.SimpleNamespace(compiled=compiled, of_kernel=lambda _: (700, None))

    monkeypatch.setattr(rows, "estimate_for_tpu", estimate_for_tpu)
    (row,) = make_rows(probes=["decode"], chips=["v5e"], heads=[(6, 3, 64)], contexts=[1024])
    found = estimate_row(row, timeout=1)
    assert found["reason"].endswith("do not grow with the tokens: 700 for 1024 and 700 for 2048")


@needs_libtpu
@pytest.mark.parametrize(
    ("probe", "chip", "context"), [("decode", "tpu7x", 1024), ("write", "v6e", 64)]
)
def test_a_probe_has_figures(probe: str, chip: str, context: int):
    """A tpu7x has them with one row only; a write, where its list is known."""
    (row,) = make_rows(probes=[probe], chips=[chip], heads=[(6, 3, 64)], contexts=[context])
    found = estimate_row(row, timeout=300)
    assert found["kernel_cycles"] > found["tile_cycles"] > 50  # a copy's start, if nothing else
    assert bool(found["tile"]) == (probe == "decode")


@needs_libtpu
def test_the_command_estimates_and_goes_on_after_what_fails(tmp_path: pathlib.Path):
    path = tmp_path / "found.json"
    probe = "decode-jax-ragged-default"
    command = [sys.executable, "-m", "benchmarks.tpu_static", "--chips", "v5e"]
    command += ["--heads", "9/3/64", "8/2/128", "--contexts", "1024", "--probes", probe]
    subprocess.run([*command, "--out", str(path)], check=True)
    written = json.loads(path.read_text())["rows"]
    assert "can not be XLA fully tiled" in written[f"v5e 9/3/64 context 1024 {probe}"]["reason"]
    found = written[f"v5e 8/2/128 context 1024 {probe}"]
    assert found["kind"] == "compiler estimate"
    assert found["kernel_cycles"] > found["tile_cycles"] > 0
    assert found["time_cycles"] >= found["memory_cycles"] == round(found["kv_bytes"] / 546)
    assert found["kv_bytes"] == 1024 * 2 * 2 * 128 * 2
    assert found["tile"] == {"tokens": 32, "blocks": 64}
    assert row_line(found).startswith(f"| v5e | 8/2/128 | 1024 | {probe} | tokens 32 blocks 64 |")
