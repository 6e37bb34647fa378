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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

ROOT = pathlib.Path(__file__).parents[1]
SEPARATOR = "== next ==\n"  # in the log, before each of several compilations


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
    """What `module` prints of `target`, and its `log`.

    Raises `NotCompiledError` where it does not compile.
    """
    run = _run(module, chip, target, options or {}, environment=environment, timeout=timeout)
    headline = f"{target} did not compile for {chip}"
    if run.reason:
        raise NotCompiledError(f"{headline}: {run.reason}:\n{run.stderr[-4000:]}", run.reason)
    *printed, fields = run.stdout.splitlines()  # Mosaic prints where others log
    return {**json.loads(fields), "log": "\n".join([run.stderr, *printed])}


def compile_each_apart(
    module: str,
    chip: str,
    target: str,
    options: Sequence[Mapping[str, Any]],
    *,
    environment: Mapping[str, str],
    timeout: int,
) -> list[dict[str, Any]]:
    """The same with each of the options; what does not compile has a `reason` and nothing else.

    One process does all of it. Where it aborts, another one goes on behind what it aborted at.
    """
    found: list[dict[str, Any]] = []
    while len(found) < len(options):
        rest = options[len(found) :]
        run = _run(module, chip, target, rest, environment=environment, timeout=timeout)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        logs = run.stderr.split(SEPARATOR)[1:]
        found += [line | {"log": log} for line, log in zip(lines, logs, strict=False)]
        if len(lines) < len(rest):
            found.append({"reason": run.reason or "nothing was printed of it"})
    return [{"reason": one["reason"]} if "reason" in one else one for one in found]


class _Run(NamedTuple):
    stdout: str
    stderr: str
    reason: str | None  # why it failed, if it did


def _run(
    module: str,
    chip: str,
    target: str,
    options: Any,
    *,
    environment: Mapping[str, str],
    timeout: int,
) -> _Run:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    with subprocess.Popen(
        [sys.executable, "-m", module, chip, target, json.dumps(options)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return _Run(*process.communicate(), f"took more than {timeout} s")
    failed = process.returncode != 0
    return _Run(stdout, stderr, failure_reason(stderr, process.returncode) if failed else None)


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
    """Builds and compiles what the command line names, and prints a line of JSON.

    A list of options makes a line each; the line of what fails has nothing but a `reason`.
    """
    chip, target, text = sys.argv[1:]
    module, _, name = target.partition(":")
    build = getattr(importlib.import_module(module), name)
    options = json.loads(text)
    if isinstance(options, dict):
        print(json.dumps(compile_here(functools.partial(build, **options), chip)))
        return
    for each in options:
        print(SEPARATOR, end="", file=sys.stderr, flush=True)
        try:
            line = compile_here(functools.partial(build, **each), chip)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others still count
            line = {"reason": failure_reason(f"{type(error).__name__}: {error}", 1)}
        print(json.dumps(line), flush=True)


def compiled_fields(
    build: Build,
    sharding: jax.sharding.Sharding,
    *,
    compiler_options: Mapping[str, str | bool] | None = None,
) -> dict[str, Any]:
    """Memory in bytes, seconds, HLO, extras; the caller has set the mesh of `sharding`."""
    function, arguments, *extra = build()
    specs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*specs)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(compiler_options or {}))
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
