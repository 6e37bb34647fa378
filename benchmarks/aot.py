"""Compiling for a device that is not there: what is the same for TPUs and GPUs.

The compiler runs in a process of its own, `python -m MODULE CHIP MODULE:FUNCTION OPTIONS_AS_JSON`.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]


class NotCompiledError(RuntimeError):
    """The compiler refused, aborted or took too long; `reason` says so in one line."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def compile_apart(
    module: str,
    chip: str,
    target: str,
    options: Mapping[str, Any] | None,
    *,
    environment: Mapping[str, str],
    timeout: int,
) -> dict[str, Any]:
    """What `module` prints of `target`. Raises `NotCompiledError` where it does not compile."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    headline = f"{target} did not compile for {chip}"
    try:
        run = subprocess.run(
            [sys.executable, "-m", module, chip, target, json.dumps(options or {})],
            env={**os.environ, **environment, "PYTHONPATH": paths},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"took more than {timeout} s"
        raise NotCompiledError(f"{headline}: {reason}", reason) from error
    if run.returncode:
        reason = failure_reason(run.stderr, run.returncode)
        raise NotCompiledError(f"{headline}:\n{run.stderr[-4000:]}", reason)
    return json.loads(run.stdout.splitlines()[-1])


def failure_reason(stderr: str, exit_status: int) -> str:
    """The line that says why: a fatal check of the compiler's, or the exception."""
    fatal = re.findall(r"^F[\d. :]+ .*?\] (.*)", stderr, re.MULTILINE)
    raised = re.findall(r"^[\w.]+(?:Error|Exception|Failure)\b.*", stderr, re.MULTILINE)
    reason = f"exit status {exit_status}"
    if fatal:
        reason = f"the compiler aborts: {fatal[0]}"
    elif raised:
        places = re.findall(r'^  File ".*", line \d+, in (\S+)', stderr, re.MULTILINE)
        silent = ":" not in raised[-1] and places
        reason = f"{raised[-1]} in {places[-1]}" if silent else raised[-1]
    without_folders = re.sub(r"(?<!\w)/(?:[\w.+-]+/)+", "", reason)  # of this machine
    return without_folders[:300]


# Returns a function, jitted or not, its abstract arguments, and any more that are JSON.
Build = Callable[[], tuple[Any, ...]]


def print_compiled(compile_here: Callable[[Build, str], dict[str, Any]]) -> None:
    """Builds and compiles what the command line names, and prints one JSON line."""
    chip, target, options = sys.argv[1:]
    module, _, name = target.partition(":")
    build = getattr(importlib.import_module(module), name)
    print(json.dumps(compile_here(functools.partial(build, **json.loads(options)), chip)))


def compiled_fields(build: Build, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Memory in bytes, seconds, HLO, extras; the caller has set the mesh of `sharding`."""
    function, arguments, *extra = build()
    specs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*specs)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 2),
        "hlo": compiled.as_text(),
        "extra": extra,
    }
