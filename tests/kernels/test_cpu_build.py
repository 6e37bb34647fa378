"""The `cpu` backend's compilation: kept in the cache, and its failures leave `xla`, with a word."""

import pathlib
import shutil

import numpy as np
import pytest

from pallas_kernels import Backend, choose_backend, default_backend
from pallas_kernels.cpu import attention, build
from pallas_kernels.cpu.build import BuildError

library = build.library.__wrapped__


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """An empty home, and no memory of what this process compiled and registered."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(attention, "library", library)
    monkeypatch.setattr(attention, "register", attention.register.__wrapped__)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
def test_a_kernel_is_compiled_once(capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    library()
    assert capfd.readouterr().err == "jpaged: compiling the CPU attention kernel, once\n"
    (made,) = tmp_path.rglob("*.so")
    library()
    assert capfd.readouterr().err == ""
    assert list(made.parent.iterdir()) == [made]
    # What GCC links for -ffast-math would make this a zero, in the whole process.
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_without_a_compiler_attention_is_by_xla(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\)"):
        library()
    assert default_backend("cpu") is Backend.XLA
    assert "attention by xla, the CPU kernel is missing: no C++ compiler" in capsys.readouterr().err
    with pytest.raises(ValueError, match="attention_backend='cpu' cannot be compiled: no C"):
        choose_backend("cpu", "cpu")


def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"broken-c\+\+ failed: no such header"):
        library()
    assert not list((tmp_path / ".cache" / "jpaged" / "kernels").iterdir())


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


@pytest.mark.parametrize(("name", "platform"), [("cpu", "gpu"), ("pallas-tpu", "cpu")])
def test_a_backend_of_another_platform_is_refused(name: str, platform: str):
    with pytest.raises(ValueError, match=f"attention_backend='{name}' needs a"):
        choose_backend(name, platform)
