"""How programs are compiled: what is told to the compiler, and the cache of what it made.

A program that was compiled once starts in no time.
"""

import pathlib
import sys

import jax

# What XLA puts into a CUDA graph, and loops besides: those of the sampler would otherwise be the
# host's, which would wait in every step for their conditions, and could send no step ahead.
_GRAPH_PARTS = ("FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "CONDITIONAL", "WHILE")

# LLVM on a CPU: at a higher level it takes a tenth longer (a scatter twice as long), and a step is
# no faster (SmolLM2, greedy and sampled, 1 and 32 rows): what takes its time is library calls.
_CPU_LEVEL = "1"

Options = dict[str, str | bool]


def compiler_options(platform: str) -> Options:
    """What the compiler is told beside its defaults: on a GPU, that a step is one CUDA graph."""
    options: dict[str, Options] = {
        "cpu": {"xla_backend_optimization_level": _CPU_LEVEL},
        "gpu": {"xla_gpu_enable_command_buffer": ",".join(_GRAPH_PARTS)},
    }
    return options.get(platform, {})


def enable_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another place.

    JAX keys them by program, versions, flags and device, so a stale one is never found.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = pathlib.Path.home() / ".cache" / "jpaged" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a folder that is not ours; no home at all
        # Said, not hidden: whoever waits for the compiler at every start should know why.
        print(
            f"jpaged: compiled programs are not kept ({error}); to keep them, set "
            "JAX_COMPILATION_CACHE_DIR to a folder that can be written to",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
