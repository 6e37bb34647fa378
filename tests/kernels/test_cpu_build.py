"""The `cpu` backend's compilation: kept in the cache, and its failures leave `xla`, with a word."""

import functools
import pathlib
import shutil
import tempfile

import numpy as np
import pytest

from pallas_kernels import Backend, backends, choose_backend, default_backend
from pallas_kernels.cpu import attention, build, pool
from pallas_kernels.cpu.build import BuildError

SOURCE = "pool.cc"
library = functools.partial(build.library.__wrapped__, SOURCE)

COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """An empty home, no compiler named, no memory of what this process compiled and registered."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for module in (attention, pool):
        monkeypatch.setattr(module, "library", build.library.__wrapped__)
        monkeypatch.setattr(module, "register", module.register.__wrapped__)
    backends._warn_once.cache_clear()


@pytest.fixture
def small_source(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """In place of the kernel, a function that is compiled at once and says 7."""
    small = 'extern "C" int seven() { return 7; }'
    more = '#ifdef MORE\nextern "C" int more() { return MORE; }\n#endif\n'
    (tmp_path / SOURCE).write_text(f"{small}\n{more}")
    monkeypatch.setattr(build, "SOURCES", tmp_path)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Where this process makes temporary folders; the home is a file, so it has to."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def make_program(path: pathlib.Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_kernel_is_compiled_once(caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path):
    library()
    assert caplog.messages == ["compiling pool.cc for this CPU, once"]
    (made,) = tmp_path.rglob("*.so")
    caplog.clear()
    library()
    assert caplog.messages == []
    assert list(made.parent.iterdir()) == [made]
    # What GCC links for -ffast-math would make this a zero, in the whole process.
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_without_a_compiler_attention_is_by_xla(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\); install"):
        library()
    assert default_backend("cpu") is Backend.XLA
    assert "attention by xla, the CPU kernels are missing: no C++ compiler" in caplog.text
    with pytest.raises(ValueError, match="attention_backend='cpu' cannot be compiled: no C"):
        choose_backend("cpu", "cpu")


@pytest.mark.parametrize(
    ("says", "message"),
    [("echo 'no such header' >&2; exit 1", "1: no such header"), ("exit 3", "3: no message")],
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    says: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    compiler = make_program(tmp_path / "broken-c++", f'[ "$1" = --version ] || {{ {says}; }}')
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=rf"broken-c\+\+ failed with exit status {message}"):
        library()
    assert not list((tmp_path / ".cache" / "jpaged" / "kernels").iterdir())


def test_a_compiler_that_says_nothing_and_makes_nothing_leaves_xla(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    monkeypatch.setenv("CXX", make_program(tmp_path / "idle-c++", "exit 0"))
    with pytest.raises(BuildError, match="No such file"):
        library()
    assert default_backend("cpu") is Backend.XLA


@pytest.mark.usefixtures("small_source")
@needs_compiler
@pytest.mark.parametrize("options", ["", " -O1 '-DNAME=a b'"])
def test_cxx_may_be_several_words(
    options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    launcher = make_program(tmp_path / "ccache", f'echo "$@" >> {tmp_path}/log; exec "$@"')
    monkeypatch.setenv("CXX", f"{launcher} {COMPILER}{options}")
    assert library().seven() == 7
    version, compiled, linked = (tmp_path / "log").read_text().splitlines()
    assert version == f"{COMPILER}{options.replace(chr(39), '')} --version"
    assert " -c " in compiled
    assert " -shared " in linked


def test_a_cxx_that_is_no_command_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(BuildError, match=r"CXX must be a command, got .*'g\+\+.*: No closing"):
        library()
    monkeypatch.setenv("CXX", "no-such-program --fast")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(no-such-program\); install one or"):
        library()


@pytest.mark.usefixtures("small_source")
@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "one bit"])
def test_a_damaged_file_in_the_cache_is_compiled_again(
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
):
    library()
    (made,) = tmp_path.rglob("*.so")
    whole, half = made.read_bytes(), made.stat().st_size // 2
    flipped = bytes([whole[half] ^ 1])
    contents = {
        "empty": b"",
        "half": whole[:half],
        "one bit": whole[:half] + flipped + whole[half + 1 :],
    }
    # In another home: what was loaded from a path, half of it gone, would take this process along.
    damaged = tmp_path / "other" / made.relative_to(tmp_path)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(contents[damage])
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    caplog.clear()
    assert library().seven() == 7
    assert caplog.messages == ["compiling pool.cc for this CPU, once"]
    assert list(damaged.parent.iterdir()) == [damaged]
    assert damaged.read_bytes() == whole
    caplog.clear()
    library()
    assert caplog.messages == []


@pytest.mark.usefixtures("small_source")
@needs_compiler
def test_what_is_defined_makes_files_of_their_own(caplog: pytest.LogCaptureFixture):
    assert [library(f"MORE={n}").more() for n in (1, 2, 1)] == [1, 2, 1]
    assert not hasattr(library(), "more")
    said = [message.partition(" for")[0] for message in caplog.messages]
    assert said == [f"compiling {SOURCE}{more}" for more in (" MORE=1", " MORE=2", "")]


@pytest.mark.usefixtures("small_source")
@needs_compiler
def test_without_a_home_the_kernel_is_loaded_and_its_folder_removed(temporary: pathlib.Path):
    assert library().seven() == 7
    assert not list(temporary.iterdir())


def test_without_a_home_a_compiler_that_fails_leaves_no_folder(
    temporary: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    compiler = make_program(tmp_path / "broken-c++", '[ "$1" = --version ]')
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match="failed with exit status 1: no message"):
        library()
    assert not list(temporary.iterdir())


def test_a_compiler_that_cannot_be_run_leaves_xla(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    compiler = tmp_path / "not-a-program"
    compiler.write_text("rubbish")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="Exec format error"):
        library()
    assert default_backend("cpu") is Backend.XLA


@pytest.mark.parametrize(
    ("name", "platform"), [("cpu", "gpu"), ("pallas-tpu", "cpu"), ("pallas-gpu", "cpu")]
)
def test_a_backend_of_another_platform_is_refused(name: str, platform: str):
    with pytest.raises(ValueError, match=f"attention_backend='{name}' needs a"):
        choose_backend(name, platform)
