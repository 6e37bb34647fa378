"""The messages on the page of errors are those of the code, word for word."""

import ast
import pathlib
import re

import pytest

from tests.docs.markdown import ROOT, blocks

PAGE = "docs/errors.md"
FOLDERS = ("jpaged", "models", "pallas_kernels")
LEAST = 15  # letters of a message that are its own: what is filled in alone proves nothing
MESSAGES = [
    " ".join(block.text.split())
    for block in blocks(PAGE)
    if block.language == "text" and not block.comment
]


def patterns() -> list[re.Pattern[str]]:
    """A pattern for every text in the code, whatever is filled in."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [pattern for path in files for pattern in patterns_of(path)]


def patterns_of(path: pathlib.Path) -> list[re.Pattern[str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        else:
            continue
        if sum(len(str(part)) for part in parts if part is not None) >= LEAST:
            pieces = [".*" if part is None else re.escape(str(part)) for part in parts]
            found.append(re.compile("".join(pieces)))
    return found


def without_kind(message: str) -> str:
    """The message without the name of its exception."""
    return re.sub(r"^\w+Error: ", "", message)


@pytest.fixture(scope="module")
def known() -> list[re.Pattern[str]]:
    return patterns()


def test_there_are_messages():
    assert len(MESSAGES) > 15


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_it(message: str, known: list[re.Pattern[str]]):
    assert any(pattern.fullmatch(without_kind(message)) for pattern in known), message


def test_words_that_the_code_does_not_have_are_noticed(known: list[re.Pattern[str]]):
    changed = without_kind(MESSAGES[0]).replace("raise memory_fraction", "take more memory")
    assert not any(pattern.fullmatch(changed) for pattern in known)
