"""Compiling for a device that is not there: what is the same for TPUs and GPUs.

The compiler runs in a process of its own, `python -m MODULE CHIP MODULE:FUNCTION OPTIONS_AS_JSON`.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels import Backend, write_kv

ROOT = pathlib.Path(__file__).parents[2]


def compile_apart(
    module: str,
    chip: str,
    target: str,
    options: Mapping[str, Any] | None,
    *,
    environment: Mapping[str, str],
    timeout: int,
) -> dict[str, Any]:
    """What `module` prints of `target`. Raises RuntimeError where it does not compile."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    run = subprocess.run(
        [sys.executable, "-m", module, chip, target, json.dumps(options or {})],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{target} did not compile for {chip}:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def print_compiled(
    compile_here: Callable[[Callable[..., Any], tuple[Any, ...], str], dict[str, Any]],
) -> None:
    """Builds and compiles what the command line names, and prints one JSON line."""
    chip, target, options = sys.argv[1:]
    module, _, name = target.partition(":")
    build = getattr(importlib.import_module(module), name)
    function, arguments = build(**json.loads(options))
    print(json.dumps(compile_here(function, arguments, chip)))


def compiled_fields(
    function: Callable[..., Any], arguments: tuple[Any, ...], sharding: jax.sharding.Sharding
) -> dict[str, Any]:
    """Memory in bytes and optimised HLO; the caller has set the mesh that `sharding` is of."""
    specs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*specs).compile()
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "hlo": compiled.as_text(),
    }


def write_before(
    attend: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step's use of one layer's pool, donated: new K and V are written, then `attend` reads."""
    q, pool, block_tables, seq_lens = arguments
    B, K, H = q.shape[0], pool.shape[1], q.shape[2]

    def step(pool, q, k, v, slots, block_tables, seq_lens):
        pool = write_kv(pool, k, v, slots, backend=Backend.XLA)
        return pool, attend(q, pool, block_tables, seq_lens)

    new = jax.ShapeDtypeStruct((B, K, H), q.dtype)
    return jax.jit(step, donate_argnums=0), (pool, q, new, new, seq_lens, block_tables, seq_lens)
