"""What importing jpaged does, and does not do: each case in a fresh interpreter."""

import os
import pathlib
import subprocess
import sys

import pytest

import jpaged

CALLS = """
for _ in range(2):
    out = jpaged.generate("the fox", model=MODEL, max_tokens=3, temperature=0, ignore_eos=True,
                          num_blocks=9, max_num_seqs=2, max_num_batched_tokens=8, warm_up=False)
    assert len(out.outputs[0].token_ids) == 3
    outs = jpaged.generate(["the fox"], model=MODEL, max_tokens=3, temperature=0, ignore_eos=True,
                           num_blocks=9, max_num_seqs=2, max_num_batched_tokens=8, warm_up=False)
    assert outs[0].outputs == out.outputs
jpaged.shutdown()
print("fine")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import jpaged",
        "import jpaged.generate",
        "import jpaged\nimport jpaged.generate",
        "import jpaged.generate\nimport jpaged",
        "import jpaged\njpaged.LLM\nimport jpaged.generate",
        "from jpaged.generate import generate\nimport jpaged",
    ],
)
def test_generate_is_the_function_whatever_is_imported_first(imports: str):
    code = f"{imports}\nfor _ in range(2): assert callable(jpaged.generate)\nprint('fine')"
    assert run(code) == "fine\n"


@pytest.mark.parametrize("imports", ["import jpaged", "import jpaged.generate"])
def test_generate_works_twice_after_either_import(imports: str, tiny_model_dir: pathlib.Path):
    assert run(f"MODEL = {str(tiny_model_dir)!r}\n{imports}\n{CALLS}") == "fine\n"


def test_import_loads_no_model_code_and_touches_no_device():
    code = """
import sys
import jpaged, jpaged.generate, jpaged.cli
jpaged.SamplingParams, jpaged.RequestOutput, jpaged.EngineFailedError, jpaged.Stats, jpaged.show
heavy = {"jax", "flax", "jpaged_models", "pallas_kernels", "torch", "transformers"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run(code) == "[]\n"


def test_classes_load_without_initialising_a_device():
    code = """
import jpaged
jpaged.LLM, jpaged.AsyncLLM
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run(code) == "False\n"


@pytest.mark.parametrize("name", jpaged.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(jpaged, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = jpaged.LMM


def run(code: str) -> str:
    """What a fresh interpreter prints that finds modules where this one does."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
