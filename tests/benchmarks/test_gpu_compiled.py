"""What is read of a compilation for a GPU: registers, spills, how many programs fit."""

import os

import pytest

from benchmarks.gpu.assembled import read_assembler, read_kernels
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.topology import compile_each_for_gpu, compile_for_gpu, missing_cuda

THUNKS = (
    "001: kCustomKernel [source       | next=002 (1)] b grid: [5, 3, 2] "
    "threads: [128, 1, 1]  shared_memory: 39168 bytes\n"
    "002: kCustomKernel [prev=001 (1) | sink        ] a__1 grid: [7, 1, 1] "
    "threads: [32, 1, 1]  shared_memory: 0 bytes\n"
)
LOG = """\
I1127 03:06:25.404799 1 x.cc:201] Using /somewhere/ptxas with version 13.0.88
I1127 03:06:25.521112 1 x.cc:356] ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a__1' for 'sm_90a'
ptxas info    : Function properties for a__1
    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 55 registers, used 0 barriers
I1127 03:06:25.785701 1 x.cc:356] ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
SPILLING = {
    "kernel": "decode",
    "heads": (32, 8, 128),
    "config": {"tile_tokens": 128, "split_tokens": 128, "num_warps": 1},
}
needs_compiler = pytest.mark.skipif(missing_cuda() is not None, reason=missing_cuda() or "")


def test_a_kernels_start_and_its_registers_are_put_together_by_name():
    b, a = read_kernels(THUNKS, LOG)
    assert (b.name, b.grid, b.threads, b.shared_bytes) == ("b", [5, 3, 2], 128, 39168)
    assert (b.registers, b.spilled_bytes) == (128, 0)
    assert (a.name, a.threads, a.registers, a.spilled_bytes) == ("a__1", 32, 55, 20)


def test_a_log_without_figures_is_an_error():
    with pytest.raises(KeyError):
        read_kernels(THUNKS, "")
    with pytest.raises(AssertionError, match="says otherwise what it spills"):
        read_kernels(THUNKS, LOG.replace("spill stores", "spills"))


def test_the_assembler_is_known_by_its_version():
    assert read_assembler(LOG) == "13.0.88"
    assert read_assembler(THUNKS) is None


@pytest.mark.parametrize(
    ("chip", "threads", "registers", "shared_bytes", "resident"),
    [
        ("sm_90a", 128, 96, 71936, 3),  # shared memory
        ("sm_80", 128, 96, 71936, 2),
        ("sm_90a", 128, 168, 0, 3),  # registers
        ("sm_90a", 224, 96, 0, 2),  # registers for 21 warps, but each of four parts has five
        ("sm_90a", 1024, 32, 0, 2),  # threads
        ("sm_89", 1024, 32, 0, 1),
        ("sm_90a", 32, 16, 0, 32),  # programs
        ("sm_89", 32, 16, 0, 24),
        ("sm_90a", 128, 32, 227 << 10, 1),
        ("sm_89", 128, 32, 100 << 10, 0),
    ],
)
def test_as_many_programs_run_as_the_scarcest_thing_allows(
    chip: str, threads: int, registers: int, shared_bytes: int, resident: int
):
    takes = {"threads": threads, "registers": registers, "shared_bytes": shared_bytes}
    assert GPUS[chip].resident(**takes) == resident


@needs_compiler
def test_a_spill_is_its_own_cuts_and_what_fails_leaves_the_others_alone():
    plain = {"kernel": "decode", "heads": (9, 3, 64)}
    wrong = {**plain, "config": {"tile_tokens": 7, "split_tokens": 7}}
    target = "benchmarks.gpu.builds:build_cut"
    found = compile_each_for_gpu(target, chip="sm_90a", options=[SPILLING, wrong, plain])
    spilling, reason, sound = found
    assert isinstance(reason, str)
    assert reason.startswith("ValueError: tile_tokens must be a power of two")
    assert not isinstance(spilling, str)
    assert spilling.kernel("paged_decode").spilled_bytes > 0
    assert not isinstance(sound, str)
    assert sound.kernel("paged_decode").spilled_bytes == 0
    assert sound.kernel("paged_decode").shared_bytes > 0
    assert sound.extra[0]["tile_tokens"] == 128


@needs_compiler
def test_alone_a_spill_is_an_error():
    with pytest.raises(RuntimeError, match="spill"):
        compile_for_gpu("benchmarks.gpu.builds:build_cut", options=SPILLING)


@needs_compiler
def test_a_process_that_dies_costs_what_it_died_of_alone():
    found = compile_each_for_gpu(
        f"{__name__}:build_or_die", chip="sm_90a", options=[{}, {"dies": True}, {}]
    )
    assert len(found) == 3
    assert all(isinstance(one, str) for one in found)
    assert ["exit status 9" in str(one) for one in found] == [False, True, False]


def build_or_die(*, dies: bool = False) -> None:
    """Ends the process without a word, or fails with one."""
    if dies:
        os._exit(9)
    raise ValueError("it is not built")
