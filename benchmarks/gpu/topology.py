"""Compiles for an NVIDIA GPU on a machine without one or its driver, through XLA's compiler.

From a test: `compile_for_gpu("benchmarks.gpu.builds:build_decode", options={...})`.
From a shell, in the repository's root, the same:

    PYTHONPATH=.:models python -m benchmarks.gpu.topology sm_90a MODULE:FUNCTION OPTIONS_AS_JSON

XLA's last step is the assembler, `ptxas` of the CUDA toolkit.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.aot import (
    Build,
    compile_apart,
    compile_each_apart,
    compiled_fields,
    print_compiled,
)
from benchmarks.gpu.assembled import Compiled, read_compiled
from benchmarks.gpu.chips import GPUS, Gpu
from jpaged.compilation import compiler_options
from pallas_kernels.gpu.mosaic.limits import missing_jax

PLUGINS = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
# Where a kernel starts, is dumped; the text of all passes over it would take most of the time.
XLA_FLAGS = "--xla_dump_emitter_re=thunk --xla_dump_to="
SPILLS_FAIL = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true "
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from there has no log
    "LLVM_DISABLE_SYMBOLIZATION": "1",  # of an error: it takes minutes
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # Mosaic's kernels do not pass through XLA's log
    "PYTHONWARNINGS": "ignore::DeprecationWarning",
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_CPP_VMODULE": "subprocess_compilation=3",  # the assembler's name and figures
}


def missing_cuda() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    plugins = [name for name in PLUGINS if _version(name)]
    if not plugins:
        return f"{PLUGINS[0]} is not installed (make gpu-aot)"
    versions = {name: _version(name) for name in ("jax", plugins[0])}
    if len(set(versions.values())) > 1:
        return f"versions differ: {versions} (make gpu-aot)"
    return None if _has_assembler() else "there is no ptxas: install the CUDA toolkit"


def missing_mosaic() -> str | None:
    """Why no Mosaic kernel can be compiled here, or None."""
    if reason := missing_jax(interpreted=False) or missing_cuda():
        return reason
    plugins = [_version(name.replace("pjrt", "plugin")) for name in PLUGINS]
    if _version("jax") in plugins:
        return None
    return f"the plugin of jax {_version('jax')} is not installed (make gpu-aot)"


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
        environment = {**ENVIRONMENT, "XLA_FLAGS": SPILLS_FAIL + XLA_FLAGS + folder}
        return read_compiled(
            compile_apart(__name__, chip, target, options, environment=environment, timeout=timeout)
        )


def compile_each_for_gpu(
    target: str, *, chip: str, options: Sequence[Mapping[str, Any]], timeout: int = 1800
) -> list[Compiled | str]:
    """The same with each of the options in turn, spilled or not; a text is why one did not compile.

    One process takes a fraction of the time of many.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**ENVIRONMENT, "XLA_FLAGS": XLA_FLAGS + folder}
        found = compile_each_apart(
            __name__, chip, target, options, environment=environment, timeout=timeout
        )
    return [one["reason"] if "reason" in one else read_compiled(one) for one in found]


def abstract_mesh(chip: str) -> jax.sharding.AbstractMesh:
    """A mesh of one such GPU, which is not there."""
    device = jax.sharding.AbstractDevice(GPUS[chip].name, GPUS[chip].num_processors, "gpu")
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((1,), ("x",), axis_types, abstract_device=device)


def compile_here(build: Build, chip: str) -> dict[str, Any]:
    """What `read_compiled` reads but the log; this process has started with XLA_FLAGS."""
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=_target_config(GPUS[chip]), topology="1x1x1"
    )
    mesh = topologies.make_mesh(devices, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        fields = compiled_fields(build, sharding, compiler_options=compiler_options("gpu"))
    return {
        **fields,
        "thunks": _take_thunks("thunk_sequence"),
        "run": _take_thunks("thunk_sequence_after_thunk_passes"),
    }


def _take_thunks(name: str) -> str:
    """XLA's list of what it starts, which is not there the next time."""
    folder = pathlib.Path(os.environ["XLA_FLAGS"].rpartition("=")[2])
    paths = sorted(folder.glob(f"*.{name}.txt"))
    thunks = "".join(path.read_text() for path in paths)
    for path in paths:
        path.unlink()
    return thunks


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_assembler() -> bool:
    """Whether there is one where XLA looks: the path, the toolkit's folder, NVIDIA's wheels."""
    wheels = importlib.util.find_spec("nvidia")
    folders = wheels.submodule_search_locations if wheels is not None else None
    paths = [path for folder in folders or () for path in pathlib.Path(folder).glob("*/bin/ptxas")]
    toolkit = pathlib.Path("/usr/local/cuda/bin/ptxas")
    return bool(paths) or shutil.which("ptxas") is not None or toolkit.exists()


def _target_config(gpu: Gpu) -> str:
    """The compiler's description of a GPU; speeds are of no concern, there is nothing to tune.

    Without a driver's version XLA puts no condition into a CUDA graph.
    """
    major, minor = gpu.capability.split(".")
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 }}
        runtime_version {{ major: 13 }}
        gpu_device_info {{
            driver_version: "13.0.0"
            runtime_version: "13.0.0"
            cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {gpu.feature}
            }}
            core_count: {gpu.num_processors}
            threads_per_warp: 32
            threads_per_block_limit: 1024
            threads_per_core_limit: {gpu.threads}
            shared_memory_per_block: {48 << 10}
            shared_memory_per_block_optin: {gpu.most_shared_bytes}
            shared_memory_per_core: {gpu.shared_memory << 10}
            registers_per_core_limit: {gpu.registers}
            registers_per_block_limit: {gpu.registers}
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
