"""What libtpu's compiler estimates of a function, without a TPU.

`estimate_for_tpu` compiles with dumps on and reads two of them: a static profile, which has one
figure of cycles for each operation of the HLO, and a kernel's final bundles with the slots that
each uses. `>` in front of a bundle says how many loops it stands in.

All of it is a compiler estimate, never a measurement.
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.tpu.topology import Compiled, compile_for_tpu

FLAGS = (
    "--xla_jf_dump_static_llo_profile_to={folder} --xla_jf_dump_to={folder} "
    "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
)
_PROFILE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_USE_FILE = re.compile(r"^\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt$")
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?: *((?:> *)*)\{")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """Some bundles of a kernel: how many, and how often they use each kind of slot."""

    bundles: int
    used: dict[str, int]
    capacity: dict[str, int]  # of one bundle

    @property
    def spills(self) -> int:
        """Registers stored because there were too few."""
        return self.used["VSTORE:SPILL"]

    @property
    def fills(self) -> int:
        """Registers loaded again after a spill."""
        return self.used["VLOAD:FILL"]

    def use(self, slot: str) -> float:
        """The share of the slots of that kind that do something."""
        return self.used[slot] / max(1, self.bundles * self.capacity[slot])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel's code."""

    whole: Code
    turn: Code  # at that depth of loops which multiplies most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The compiler's figures of one function."""

    compiled: Compiled
    cycles: dict[str, int]  # of each operation of the HLO that takes any
    kernels: dict[str, Kernel]  # by the operation's name, as in `cycles`

    def of_kernel(self, name: str) -> tuple[int, Kernel]:
        """Cycles and code of the only kernel of that name.

        Of a program without one: the cycles of all its operations, and the code of the slowest.
        """
        found = [op for op in self.kernels if re.sub(r"\.\d+$", "", op) == name]
        if not found:
            slowest = max(self.cycles, key=self.cycles.__getitem__)
            return sum(self.cycles.values()), self.kernels[slowest]
        (kernel,) = found
        return self.cycles[kernel], self.kernels[kernel]


def estimate_for_tpu(
    target: str, *, chip: str = "v5e", options: Mapping[str, Any] | None = None, timeout: int = 300
) -> Estimate:
    """Compiles as `compile_for_tpu` does, and estimates. The estimator aborts on v4."""
    with tempfile.TemporaryDirectory() as name:
        compiled = compile_for_tpu(
            target,
            chip=chip,
            options=options,
            libtpu_flags=FLAGS.format(folder=name),
            timeout=timeout,
        )
        folder = pathlib.Path(name)
        return Estimate(
            compiled=compiled, cycles=_read_profiles(folder), kernels=_read_kernels(folder)
        )


def _read_profiles(folder: pathlib.Path) -> dict[str, int]:
    texts = [path.read_text() for path in folder.glob("*_static_llo_profile.textproto")]
    return {op: int(cycles) for text in texts for op, cycles in _PROFILE.findall(text)}


def _read_kernels(folder: pathlib.Path) -> dict[str, Kernel]:
    """Every operation that has code of its own; the frame around them has no profile."""
    kernels = {}
    for path in folder.iterdir():
        match = _USE_FILE.match(path.name)
        if match is None:
            continue
        number = path.name.partition("-")[0]
        (bundles,) = folder.glob(f"{number}-{match[1]}-*-final_bundles.txt".replace("[", "[[]"))
        kernels[match[1]] = read_kernel(path.read_text(), bundles.read_text())
    return kernels


def read_kernel(use: str, bundles: str) -> Kernel:
    """A kernel from the texts of its two dumps: a line a bundle in both."""
    _, capacity, used = re.split(r"^== .*:\n", use, flags=re.MULTILINE)
    names_line, capacity_line = capacity.strip().splitlines()
    names = names_line.split(", ")
    limits = dict(zip(names, map(int, capacity_line.split()), strict=True))
    rows = [[int(count) for count in line.split()] for line in used.strip().splitlines()]
    depths = [match[1].count(">") for match in map(_BUNDLE.match, bundles.splitlines()) if match]
    by_depth: dict[int, list[list[int]]] = {}
    for row, depth in zip(rows, depths, strict=True):
        by_depth.setdefault(depth, []).append(row)
    matmul = names.index("MATMUL")

    def rank(depth: int) -> tuple[bool, bool, int, int]:
        # A loop that starts copies may be longer than the one that multiplies, and a loop of one
        # turn is none.
        code = by_depth[depth]
        products = sum(row[matmul] for row in code)
        return products > 0, depth > 0, products, len(code)

    return Kernel(
        whole=_code(names, limits, rows),
        turn=_code(names, limits, by_depth[max(by_depth, key=rank)]),
    )


def _code(names: list[str], capacity: dict[str, int], rows: list[list[int]]) -> Code:
    totals = [sum(column) for column in zip(*rows, strict=True)]
    used = dict(zip(names, totals, strict=True))
    return Code(bundles=len(rows), used=used, capacity=capacity)
