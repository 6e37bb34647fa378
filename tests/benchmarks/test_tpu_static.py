"""Estimates of TPU kernels: the compiler's dumps are read right, and a row has its figures."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.aot import failure_reason
from benchmarks.tpu.estimate import read_kernel
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


def test_a_loop_is_told_from_what_stands_around_it():
    kernel = read_kernel(USE, BUNDLES)
    assert (kernel.whole.bundles, kernel.turn.bundles) == (5, 2)
    assert (kernel.whole.spills, kernel.whole.fills) == (2, 3)
    assert kernel.turn.use("VALU") == 7 / 8
    assert kernel.turn.use("MATMUL") == 2 / 4


def test_a_kernel_without_a_loop_is_its_own_turn():
    kernel = read_kernel(USE, BUNDLES.replace("> {", "{"))
    assert kernel.turn == kernel.whole


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


@pytest.mark.skipif(missing_libtpu() is not None, reason=missing_libtpu() or "")
def test_the_command_estimates_and_goes_on_after_what_fails(tmp_path: pathlib.Path):
    path = tmp_path / "found.json"
    probe = "decode-jax-ragged-default"
    command = [sys.executable, "-m", "benchmarks.tpu_static", "--chips", "v5e"]
    command += ["--heads", "9/3/64", "8/2/128", "--contexts", "1024", "--probes", probe]
    subprocess.run([*command, "--out", str(path)], check=True)
    rows = json.loads(path.read_text())["rows"]
    assert "can not be XLA fully tiled" in rows[f"v5e 9/3/64 context 1024 {probe}"]["reason"]
    found = rows[f"v5e 8/2/128 context 1024 {probe}"]
    assert found["kind"] == "compiler estimate"
    assert found["kernel_cycles"] > found["tile_cycles"] > 0
    assert found["time_cycles"] >= found["memory_cycles"] == round(found["kv_bytes"] / 546)
    assert found["kv_bytes"] == 1024 * 2 * 2 * 128 * 2
    assert row_line(found).startswith(f"| v5e | 8/2/128 | 1024 | {probe} |")
