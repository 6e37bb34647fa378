"""Compiles `paged_attention.cc` with the machine's own compiler, once, into the user's cache."""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax

SOURCE = pathlib.Path(__file__).with_name("paged_attention.cc")
COMPILE = ("-c", "-std=c++17", "-O3", "-march=native", "-ffast-math", "-DNDEBUG", "-fPIC", "-w")
LINK = ("-shared",)  # without -ffast-math, for which GCC links code that flushes subnormals to zero


class BuildError(Exception):
    """Why there is no compiled kernel on this machine."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel, from the cache or from the compiler. Raises BuildError."""
    try:
        return _found_or_compiled()
    except (OSError, RuntimeError) as error:  # no home, a folder that is not ours, no such program
        raise BuildError(str(error)) from error


def _found_or_compiled() -> ctypes.CDLL:
    compiler = _compiler()
    file = _cache_folder() / f"paged_attention-{_key(compiler)}.so"
    if not file.exists():
        print("jpaged: compiling the CPU attention kernel, once", file=sys.stderr)
        _compile(compiler, file)
    return ctypes.CDLL(str(file))


def _compiler() -> str:
    """The path of $CXX, or of the first C++ compiler found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler ({', '.join(names)})")


def _cache_folder() -> pathlib.Path:
    """A folder of the user's; where there is none to write to, one for this process."""
    folder = pathlib.Path.home() / ".cache" / "jpaged" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return pathlib.Path(tempfile.mkdtemp(prefix="jpaged-"))
    return folder


def _key(compiler: str) -> str:
    """What a compiled file depends on: source, flags, compiler, jaxlib's headers, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts = (
        SOURCE.read_text(),
        *COMPILE,
        *LINK,
        version.stdout,
        importlib.metadata.version("jaxlib"),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The instructions that this processor has: a home folder may be shared between machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, file: pathlib.Path) -> None:
    """Compiles to a file of this process's own and renames it: others see all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = pathlib.Path(folder) / file.name
        compiled = made.with_suffix(".o")
        include = f"-I{jax.ffi.include_dir()}"
        _run([compiler, *COMPILE, include, str(SOURCE), "-o", str(compiled)])
        _run([compiler, *LINK, str(compiled), "-o", str(made)])
        made.replace(file)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
