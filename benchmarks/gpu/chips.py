"""The GPUs that are compiled for, and how many programs one of their processors runs at a time."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the compiler asks of a GPU."""

    name: str
    capability: str
    feature: str = "NONE"  # beside the capability
    num_processors: int
    threads: int  # that a processor holds
    programs: int  # likewise
    shared_memory: int  # of a processor, in KiB
    registers: int = 65536

    @property
    def most_shared_bytes(self) -> int:
        """Of a program: each takes a KiB more than it asks for."""
        return (self.shared_memory << 10) - RESERVED_BYTES

    def resident(self, *, threads: int, registers: int, shared_bytes: int) -> int:
        """How many such programs a processor runs at a time; `registers` are a thread's."""
        warps = threads // WARP
        warp_registers = _rounded(registers * WARP, REGISTER_UNIT)
        most_warps = self.registers // warp_registers // WARP_UNIT * WARP_UNIT
        shared = _rounded(shared_bytes + RESERVED_BYTES, SHARED_UNIT)
        return min(
            self.programs,
            self.threads // threads,
            most_warps // warps,
            (self.shared_memory << 10) // shared,
        )


# How the hardware rounds, from NVIDIA's occupancy tables; the same from 8.0 to 9.0.
WARP = 32
WARP_UNIT = 4  # a processor has four parts, each with a quarter of its registers
REGISTER_UNIT = 256
SHARED_UNIT = 128
RESERVED_BYTES = 1 << 10

GPUS = {
    "sm_80": Gpu(
        name="NVIDIA A100",
        capability="8.0",
        num_processors=108,
        threads=2048,
        programs=32,
        shared_memory=164,
    ),
    "sm_89": Gpu(
        name="NVIDIA L4",
        capability="8.9",
        num_processors=58,
        threads=1536,
        programs=24,
        shared_memory=100,
    ),
    "sm_90a": Gpu(
        name="NVIDIA H100",
        capability="9.0",
        feature="ACCELERATED_FEATURES",
        num_processors=132,
        threads=2048,
        programs=32,
        shared_memory=228,
    ),
}


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
