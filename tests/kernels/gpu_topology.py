"""Compiles for an NVIDIA GPU on a machine without one, driver or toolkit, through XLA's compiler.

From a test: `compile_for_gpu("tests.kernels.test_gpu_compile:build_decode", options={...})`.
From a shell, in the repository's root, the same:

    PYTHONPATH=.:models python -m tests.kernels.gpu_topology sm_90a MODULE:FUNCTION OPTIONS_AS_JSON
"""

import dataclasses
import importlib.metadata
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from benchmarks.aot import Build, compile_apart, compiled_fields, print_compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the compiler asks of a GPU."""

    name: str
    capability: str  # as protobuf text
    num_processors: int
    threads: int  # that a processor holds
    shared_memory: int  # of a processor, in KiB; a program gets one less


GPUS = {
    "sm_80": Gpu(
        name="NVIDIA A100",
        capability="major: 8",
        num_processors=108,
        threads=2048,
        shared_memory=164,
    ),
    "sm_89": Gpu(
        name="NVIDIA L4",
        capability="major: 8 minor: 9",
        num_processors=58,
        threads=1536,
        shared_memory=100,
    ),
    "sm_90a": Gpu(
        name="NVIDIA H100",
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        num_processors=132,
        threads=2048,
        shared_memory=228,
    ),
}
HEADS = [(32, 8, 128), (9, 3, 64), (14, 2, 64), (8, 2, 80), (7, 1, 96), (4, 1, 256)]
# Of a pool, in the long matrix.
EIGHT_BITS = [
    pytest.param("int8", marks=pytest.mark.kernels),
    pytest.param("float8_e4m3fn", marks=pytest.mark.kernels),
]
# Spilled registers, and more shared memory than a program can have, are errors.
XLA_FLAGS = (
    "--xla_gpu_fail_ptx_compilation_on_register_spilling=true --xla_dump_emitter_re=.* "
    "--xla_dump_to="
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How one kernel of a compiled function is started."""

    name: str
    grid: list[int]
    threads: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a function: memory in bytes, kernels in order, optimised HLO."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    compile_seconds: float  # without tracing and lowering
    kernels: list[Kernel]
    hlo: str
    extra: list[Any]  # what the target returned besides


def missing_cuda() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    versions = {}
    for name in ("jax", "jax-cuda13-pjrt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed (make gpu-aot)"
    if len(set(versions.values())) > 1:
        return f"versions differ: {versions} (make gpu-aot)"
    return None


def num_lowered_for_cuda(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Kernels of a function that come as far as Triton's language; this needs no plugin."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("__gpu$xla.gpu.triton")


def compile_for_gpu(
    target: str,
    *,
    chip: str = "sm_90a",
    options: Mapping[str, Any] | None = None,
    timeout: int = 300,
) -> Compiled:
    """Compiles what `target` builds, in a process of its own; a spilled register is an error.

    Args:
        target: "module:function". Called with `options`, which must be JSON, the function returns
            what to compile (jitted or not) and a tuple of its arguments, `jax.ShapeDtypeStruct`s
            in any pytree, which need no sharding, and any more that are JSON.
        chip: one of GPUS.
        options: what `target` is called with.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "LLVM_DISABLE_SYMBOLIZATION": "1",  # of an error: it takes minutes
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
            "XLA_FLAGS": XLA_FLAGS + folder,
        }
        fields = compile_apart(
            __name__, chip, target, options, environment=environment, timeout=timeout
        )
        thunks = [path.read_text() for path in pathlib.Path(folder).glob("*.thunk_sequence.txt")]
    return Compiled(**fields, kernels=_kernels("".join(thunks)))


def _kernels(thunks: str) -> list[Kernel]:
    """Those in XLA's list of what it starts, its own fusions as well."""
    pattern = (
        r"Kernel \[.*\] (\S+) grid: \[([\d, ]+)\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+)"
    )
    return [
        Kernel(
            name=name,
            grid=[int(size) for size in grid.split(",")],
            threads=int(threads),
            shared_bytes=int(shared),
        )
        for name, grid, threads, shared in re.findall(pattern, thunks)
    ]


def compile_here(build: Build, chip: str) -> dict[str, Any]:
    """The fields of `Compiled` but its kernels; this process has started with XLA_FLAGS."""
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="cuda", target_config=_target_config(GPUS[chip]), topology="1x1x1"
    )
    mesh = topologies.make_mesh(devices, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return compiled_fields(build, sharding)


def _target_config(gpu: Gpu) -> str:
    """The compiler's description of a GPU; speeds are of no concern, there is nothing to tune."""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 }}
        runtime_version {{ major: 13 }}
        gpu_device_info {{
            cuda_compute_capability {{ {gpu.capability} }}
            core_count: {gpu.num_processors}
            threads_per_warp: 32
            threads_per_block_limit: 1024
            threads_per_core_limit: {gpu.threads}
            shared_memory_per_block: {48 << 10}
            shared_memory_per_block_optin: {gpu.shared_memory - 1 << 10}
            shared_memory_per_core: {gpu.shared_memory << 10}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            fpus_per_core: 128
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
            memory_bandwidth: 3350000000000
            l2_cache_size: 52428800
            clock_rate_ghz: 1.7
            device_memory_size: 80000000000
        }}"""


if __name__ == "__main__":
    print_compiled(compile_here)
