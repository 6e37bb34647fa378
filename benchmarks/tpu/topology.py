"""Compiles for a TPU on a machine without one, through libtpu's compiler.

From a test: `compile_for_tpu("tests.kernels.test_tpu_compile:build_decode", options={...})`.
From a shell, in the repository's root, the same:

    PYTHONPATH=.:models python -m benchmarks.tpu.topology v5e MODULE:FUNCTION OPTIONS_AS_JSON
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from benchmarks.aot import Build, compile_apart, compiled_fields, print_compiled

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# libtpu reads these when it loads; without them it looks for the cloud's metadata server.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two tests at once would stop at a lock file
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a function: its memory in bytes, its time, the optimised HLO."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    compile_seconds: float  # without tracing and lowering
    hlo: str
    extra: list[Any]  # what the target returned besides
    log: str  # what the compiler printed


def missing_libtpu() -> str | None:
    """Why nothing can be compiled for a TPU here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (the extra `tpu-aot`)"
    return None


def compile_for_tpu(
    target: str,
    *,
    chip: str = "v5e",
    options: Mapping[str, Any] | None = None,
    libtpu_flags: str = "",
    timeout: int = 300,
) -> Compiled:
    """Compiles what `target` builds, in a process of its own: the compiler aborts where it fails.

    Args:
        target: "module:function". Called with `options`, which must be JSON, the function returns
            what to compile (jitted or not), a tuple of its arguments, `jax.ShapeDtypeStruct`s
            in any pytree, which need no sharding, and any more that are JSON.
        chip: one of TOPOLOGIES.
        options: what `target` is called with.
        libtpu_flags: libtpu reads them from the environment only, when it loads.
        timeout: seconds.
    """
    fields = compile_apart(
        __name__,
        chip,
        target,
        options,
        environment={**ENVIRONMENT, "LIBTPU_INIT_ARGS": libtpu_flags},
        timeout=timeout,
    )
    return Compiled(**fields)


def compile_here(build: Build, chip: str) -> dict[str, Any]:
    """The fields of `Compiled`; this process must have started with ENVIRONMENT."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        return compiled_fields(build, sharding)


if __name__ == "__main__":
    print_compiled(compile_here)
