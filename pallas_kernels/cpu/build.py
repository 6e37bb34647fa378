"""Compiles our C++ with the machine's own compiler, once, into the user's cache."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import jax

logger = logging.getLogger(__name__)  # unconfigured, Python prints its warnings on stderr
SOURCES = pathlib.Path(__file__).parent
COMPILE = ("-c", "-std=c++17", "-O3", "-march=native", "-ffast-math", "-DNDEBUG", "-fPIC", "-w")
LINK = ("-shared",)  # without -ffast-math, for which GCC links code that flushes subnormals to zero


class BuildError(Exception):
    """Why there is no compiled kernel on this machine."""


@functools.cache
def library(source: str, *defines: str) -> ctypes.CDLL:
    """A compiled file of ours, from the cache or from the compiler. Raises BuildError."""
    try:
        return _found_or_compiled(SOURCES / source, defines)
    except OSError as error:  # no such program, nowhere to write to
        raise BuildError(str(error)) from error


def register(compiled: ctypes.CDLL, symbol: str, target: str | None = None) -> None:
    """Makes a kernel of the library known to XLA, as `target` or by its own name."""
    handler = jax.ffi.pycapsule(getattr(compiled, symbol))
    jax.ffi.register_ffi_target(target or symbol, handler, platform="cpu")


def _found_or_compiled(source: pathlib.Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    command = [*_compiler(), *(f"-D{define}" for define in defines)]
    name = f"{source.stem}-{_key(source, command)}"
    with _cache_folder() as folder:
        file = next(filter(_is_whole, folder.glob(f"{name}-*.so")), None)
        if file is None:
            logger.warning("compiling %s for this CPU, once", " ".join([source.name, *defines]))
            file = _compile(source, command, folder, name)
        return ctypes.CDLL(str(file))


def _compiler() -> list[str]:
    """The command that $CXX names, or the first C++ compiler found."""
    try:
        commands = [shlex.split(os.environ.get("CXX", ""))]
    except ValueError as error:
        raise BuildError(f"CXX must be a command, got {os.environ['CXX']!r}: {error}") from error
    if not commands[0]:
        commands = [["g++"], ["clang++"], ["c++"]]
    for program, *options in commands:
        if path := shutil.which(program):
            return [path, *options]
    names = ", ".join(program for program, *_ in commands)
    raise BuildError(f"no C++ compiler ({names}); install one or name it in CXX")


def _key(source: pathlib.Path, compiler: list[str]) -> str:
    """What a compiled file depends on: source, headers, flags, compiler, jaxlib, processor."""
    version = _run([*compiler, "--version"])
    parts = (
        source.read_text(),
        *(header.read_text() for header in sorted(SOURCES.glob("*.h"))),
        *COMPILE,
        *LINK,
        *compiler,
        version,
        importlib.metadata.version("jaxlib"),
        processor(),
    )
    return _digest("\0".join(parts).encode())


@functools.cache
def processor() -> str:
    """The instructions that this processor has: a home folder may be shared between machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@contextlib.contextmanager
def _cache_folder() -> Iterator[pathlib.Path]:
    """A folder of the user's; where there is none to write to, one until the kernel is loaded."""
    try:
        folder = pathlib.Path.home() / ".cache" / "jpaged" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a folder that is not ours; no home at all
        with tempfile.TemporaryDirectory(prefix="jpaged-") as temporary:
            yield pathlib.Path(temporary)
    else:
        yield folder


def _is_whole(file: pathlib.Path) -> bool:
    """Whether the file's content has the digest in its name: loading half a file may be fatal."""
    return file.stem.rpartition("-")[2] == _digest(file.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compile(
    source: pathlib.Path, compiler: list[str], folder: pathlib.Path, name: str
) -> pathlib.Path:
    """Compiles to a file of this process's own and renames it: others see all of it or nothing.

    Where the machine goes down before the content is on the disk, `_is_whole` finds out.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        compiled, linked = pathlib.Path(own, "kernel.o"), pathlib.Path(own, "kernel.so")
        include = f"-I{jax.ffi.include_dir()}"
        _run([*compiler, *COMPILE, include, str(source), "-o", str(compiled)])
        _run([*compiler, *LINK, str(compiled), "-o", str(linked)])
        return linked.replace(folder / f"{name}-{_digest(linked.read_bytes())}.so")


def _run(command: list[str]) -> str:
    """What the command printed. Raises BuildError with what it said where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip()[:500] or "no message"
        raise BuildError(f"{command[0]} failed with exit status {done.returncode}: {said}")
    return done.stdout
