"""The rows of `benchmarks.gpu_static`: which kernel in which shape, and what it takes of a chip.

One more kernel is one more entry of CALLS, and a function that builds it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.assembled import Compiled, Kernel, read_assembler
from benchmarks.gpu.builds import ATTENTION, HEADS
from benchmarks.gpu.chips import GPUS
from benchmarks.gpu.topology import compile_each_for_gpu

# Of queries and pool; a pool of eight bits has queries of the model's usual dtype.
DTYPES = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is compiled: a function that builds it, what that is told, the kernels to be found."""

    target: str
    options: Mapping[str, Any]
    kernels: tuple[str, ...]


def _attention(kernel: str, **options: Any) -> Call:
    target = "benchmarks.gpu.builds:build_cut"
    options = {"kernel": kernel, **options}
    return Call(target=target, options=options, kernels=ATTENTION[kernel].kernels)


CALLS = {
    "decode": _attention("decode"),
    "decode, every option": _attention("decode", every_option=True),
    "prefill": _attention("prefill"),
    "prefill, every option": _attention("prefill", every_option=True),
    "copy blocks": Call(
        target="benchmarks.gpu.builds:build_copies", options={}, kernels=("copy_blocks",)
    ),
    "write K and V": Call(
        target="benchmarks.gpu.builds:build_write", options={}, kernels=("write_kv",)
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    chip: str
    call: str
    heads: tuple[int, int, int]
    dtype: str
    pool_dtype: str

    @property
    def name(self) -> str:
        """The row in words, which is its key in the results."""
        heads = "/".join(map(str, self.heads))
        return f"{self.chip} {heads} {self.dtype} pool {self.pool_dtype} {self.call}"

    @property
    def options(self) -> dict[str, Any]:
        """What its call's function is told."""
        shape: dict[str, Any] = {"heads": self.heads, "dtype": self.dtype}
        if self.pool_dtype != self.dtype:
            shape["pool_dtype"] = self.pool_dtype
        return {**CALLS[self.call].options, **shape}


def make_rows(
    *,
    chips: Iterable[str] = GPUS,
    calls: Iterable[str] = CALLS,
    heads: Iterable[tuple[int, int, int]] = HEADS,
    dtypes: Iterable[tuple[str, str]] = DTYPES,
) -> list[Row]:
    """Rows in the table's order."""
    return [
        Row(chip=chip, call=call, heads=shape, dtype=dtype, pool_dtype=pool_dtype)
        for chip, call, shape, (dtype, pool_dtype) in itertools.product(chips, calls, heads, dtypes)
    ]


def compile_rows(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The figures of each row, which are all of one chip and call, and the assembler's version."""
    (target,) = {CALLS[row.call].target for row in rows}
    (chip,) = {row.chip for row in rows}
    found = compile_each_for_gpu(target, chip=chip, options=[row.options for row in rows])
    versions = [read_assembler(one.log) for one in found if isinstance(one, Compiled)]
    figures = {row.name: _figures(row, one) for row, one in zip(rows, found, strict=True)}
    return figures, next(filter(None, versions), None)


def _figures(row: Row, compiled: Compiled | str) -> dict[str, Any]:
    """A row's configuration and kernels, or why there are none."""
    if isinstance(compiled, str):
        return {"reason": compiled}
    kernels = {
        name: kernel_figures(compiled.kernel(name), row.chip) for name in CALLS[row.call].kernels
    }
    return {"config": compiled.extra[0], "kernels": kernels}


def kernel_figures(kernel: Kernel, chip: str) -> dict[str, int]:
    """What a kernel takes, and how many of its programs one processor runs at a time."""
    takes = {
        "threads": kernel.threads,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
    }
    resident = GPUS[chip].resident(**takes)
    return {**takes, "spilled_bytes": kernel.spilled_bytes, "resident": resident}


def table_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A headline, and a line for each kernel; a row without kernels says why."""
    titles = ("row", "cut", "kernel", "threads", "registers", "shared", "spilled", "programs")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, row in rows.items():
        if "reason" in row:
            lines.append(f"| {name} | none: {row['reason']} |")
            continue
        cut = " ".join(f"{field}={value}" for field, value in row["config"].items())
        lines += [
            f"| {name} | {cut} | {kernel} | {' | '.join(map(str, figures.values()))} |"
            for kernel, figures in row["kernels"].items()
        ]
    return lines
