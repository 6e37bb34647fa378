"""What the compiler made of a function for a GPU: memory, and each kernel's start and registers.

XLA's dump says how kernels are started, the assembler (`ptxas -v`, in XLA's log) what they take.
"""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a compiled function."""

    name: str
    grid: list[int]
    threads: int
    shared_bytes: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread, stored and loaded again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a function: memory in bytes, kernels in order, optimised HLO."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    compile_seconds: float  # without tracing and lowering
    kernels: list[Kernel]
    run: list[str]  # what the host starts: XLA's names of kernels, loops, whole graphs of them
    hlo: str
    extra: list[Any]  # what the target returned besides
    log: str  # what the compiler printed

    def kernel(self, name: str) -> Kernel:
        """The one of this name."""
        (found,) = (kernel for kernel in self.kernels if kernel.name == name)
        return found


def read_compiled(fields: dict[str, Any]) -> Compiled:
    """From the fields of a compilation, XLA's list of what it starts and the log among them."""
    rest = {key: fields[key] for key in fields if key not in ("thunks", "run")}
    kernels = read_kernels(fields["thunks"], fields["log"])
    run = re.findall(r"^\d+: k(\w+)", fields["run"], re.MULTILINE)
    return Compiled(**rest, kernels=kernels, run=run)


def read_kernels(thunks: str, log: str) -> list[Kernel]:
    """Those in XLA's list of what it starts, its own fusions as well."""
    taken = read_registers(log)
    pattern = (
        r"Kernel \[.*\] (\S+) grid: \[([\d, ]+)\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+)"
    )
    return [
        Kernel(
            name=name,
            grid=[int(size) for size in grid.split(",")],
            threads=int(threads),
            shared_bytes=int(shared),
            registers=taken[name][0],
            spilled_bytes=taken[name][1],
        )
        for name, grid, threads, shared in re.findall(pattern, thunks)
    ]


def read_registers(log: str) -> dict[str, tuple[int, int]]:
    """Registers of a thread and spilled bytes by the kernel's name."""
    taken = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spilled is not None, f"the assembler says otherwise what it spills: {part[:400]}"
        assert registers is not None, f"the assembler says otherwise what it takes: {part[:400]}"
        taken[name] = int(registers[1]), int(spilled[1]) + int(spilled[2])
    return taken


def read_assembler(log: str) -> str | None:
    """The version of the assembler, where it is in the log: a process looks for it once."""
    found = re.search(r"Using \S*ptxas with version ([\d.]+\d)", log)
    return found[1] if found else None
