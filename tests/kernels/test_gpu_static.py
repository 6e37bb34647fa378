"""The table of registers and shared memory of the GPU kernels, against what is compiled anew."""

import json
import pathlib
from typing import Any

import jax
import pytest

from benchmarks import gpu_static
from benchmarks.aot import ROOT
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.static_rows import CALLS, Row, compile_rows, make_rows, table_lines
from benchmarks.gpu.topology import missing_cuda

PATH = ROOT / "benchmarks/results/2026-11-27-gpu-static.json"
TABLE = json.loads(PATH.read_text())
SHORT_HEADS = [(32, 8, 128), (14, 2, 64)]
SHORT_DTYPES = [("bfloat16", "bfloat16"), ("bfloat16", "int8")]
SHORT_CALLS = ["decode", "prefill, every option"]


def reason_to_skip() -> str | None:
    """Why what is compiled here cannot be compared, or None."""
    if reason := missing_cuda():
        return reason
    if jax.__version__ != TABLE["jax"]:
        return f"the table is of jax {TABLE['jax']}, and here is {jax.__version__}"
    return None


comparable = pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or "")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What a row has that is not as in the table: cut, memory, more registers, any spill."""
    if "reason" in expected or "reason" in found:
        return [] if found == expected else [f"{found} and not {expected}"]
    wrong = [] if found["config"] == expected["config"] else [f"cut {found['config']}"]
    if found["kernels"].keys() != expected["kernels"].keys():
        return [*wrong, f"kernels {list(found['kernels'])}"]
    for name, kernel in found["kernels"].items():
        known = expected["kernels"][name]
        if kernel["spilled_bytes"]:
            wrong.append(f"{name} spills {kernel['spilled_bytes']}")
        if kernel["registers"] > known["registers"]:
            wrong.append(f"{name} takes {kernel['registers']} registers, not {known['registers']}")
        wrong += [
            f"{name} has {field} {kernel[field]}, not {known[field]}"
            for field in ("threads", "shared_bytes")
            if kernel[field] != known[field]
        ]
    return wrong


def check(rows: list[Row]) -> None:
    """Compiles rows of one chip and call, and compares."""
    found, assembler = compile_rows(rows)
    if assembler != TABLE["ptxas"]:
        pytest.skip(f"the table is of ptxas {TABLE['ptxas']}, and here is {assembler}")
    wrong = {name: differences(row, TABLE["rows"][name]) for name, row in found.items()}
    assert {name: each for name, each in wrong.items() if each} == {}


def test_the_table_has_every_row_and_no_kernel_in_it_spills():
    assert sorted(TABLE["rows"]) == sorted(row.name for row in make_rows())
    for name, row in TABLE["rows"].items():
        chip, pool = name.split()[0], name.split()[4]
        # Triton converts from float8 on none below 8.9, which copies alone do without.
        is_converted = pool == "float8_e4m3fn" and not name.endswith("copy blocks")
        assert ("reason" in row) == (chip == "sm_80" and is_converted), name
        for kernel in row.get("kernels", {}).values():
            assert kernel["spilled_bytes"] == 0, name
            assert kernel["shared_bytes"] <= GPUS[chip].most_shared_bytes, name
            taken = {key: kernel[key] for key in ("threads", "registers", "shared_bytes")}
            assert kernel["resident"] == GPUS[chip].resident(**taken) >= 1, name


@comparable
@pytest.mark.parametrize("call", SHORT_CALLS)
@pytest.mark.parametrize("chip", GPUS)
def test_the_table_is_what_the_compiler_makes(chip: str, call: str):
    check(make_rows(chips=[chip], calls=[call], heads=SHORT_HEADS, dtypes=SHORT_DTYPES))


@comparable
@pytest.mark.kernels
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("chip", GPUS)
def test_the_whole_table_is_what_the_compiler_makes(chip: str, call: str):
    check(make_rows(chips=[chip], calls=[call]))


def test_the_table_is_as_the_command_writes_it(tmp_path: pathlib.Path):
    head = {key: value for key, value in TABLE.items() if key != "rows"}
    gpu_static.write(tmp_path / "table.json", head, TABLE["rows"])
    assert (tmp_path / "table.json").read_text() == PATH.read_text()


def test_a_row_is_printed_with_its_kernels_or_with_what_it_lacks():
    lines = table_lines({"a row": ROW, "another": {"reason": "it is too large"}})
    assert lines[2:] == [
        "| a row | num_warps=4 | a | 128 | 96 | 4096 | 0 |",
        "| another | none: it is too large |",
    ]


ROW = {
    "config": {"num_warps": 4},
    "kernels": {"a": {"threads": 128, "registers": 96, "shared_bytes": 4096, "spilled_bytes": 0}},
}


def changed(**fields: int) -> dict[str, Any]:
    return {**ROW, "kernels": {"a": {**ROW["kernels"]["a"], **fields}}}


def test_fewer_registers_are_as_good():
    assert differences(ROW, ROW) == []
    assert differences(changed(registers=95), ROW) == []


@pytest.mark.parametrize(
    "found",
    [
        changed(registers=97),
        changed(shared_bytes=4095),
        changed(shared_bytes=4097),
        changed(threads=64),
        changed(spilled_bytes=4),
        {**ROW, "config": {"num_warps": 8}},
        {**ROW, "kernels": {}},
        {"reason": "it does not compile"},
    ],
    ids=str,
)
def test_a_difference_is_found(found: dict[str, Any]):
    assert len(differences(found, ROW)) == 1
