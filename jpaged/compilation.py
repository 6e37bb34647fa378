"""The persistent compilation cache: a program that was compiled once starts in no time."""

import pathlib

import jax


def enable_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another place.

    JAX keys them by program, versions, flags and device, so a stale one is never found.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = pathlib.Path.home() / ".cache" / "jpaged" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or a read-only one: every start compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
