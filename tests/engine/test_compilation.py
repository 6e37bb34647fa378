"""Where compiled programs are kept, and that an engine starts where they cannot be."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from jpaged.compilation import enable_cache

NAME = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    chosen = jax.config.values[NAME]
    jax.config.update(NAME, None)
    yield
    jax.config.update(NAME, chosen)


def test_programs_are_kept_in_the_user_s_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    enable_cache()
    folder = tmp_path / ".cache" / "jpaged" / "xla"
    assert folder.is_dir()
    assert jax.config.values[NAME] == str(folder)
    assert capsys.readouterr().err == ""


def test_another_folder_that_was_chosen_stays_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update(NAME, "/elsewhere")
    enable_cache()
    assert jax.config.values[NAME] == "/elsewhere"
    assert not list(tmp_path.iterdir())


def test_without_a_home_nothing_is_kept_and_one_line_says_so(monkeypatch, capsys):
    def no_home() -> pathlib.Path:  # what a user without a passwd entry and $HOME has
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    enable_cache()
    assert jax.config.values[NAME] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "not kept (Could not determine home directory" in line
    assert "JAX_COMPILATION_CACHE_DIR" in line


def test_a_home_that_cannot_be_written_to_is_the_same(monkeypatch, tmp_path, capsys):
    home = tmp_path / "a file"
    home.touch()
    monkeypatch.setenv("HOME", str(home))
    enable_cache()
    assert jax.config.values[NAME] is None
    assert "a file" in capsys.readouterr().err
