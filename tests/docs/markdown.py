"""The pages of the documentation and the fenced blocks in them."""

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        ROOT / "README.md",
        ROOT / "pallas_kernels" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SHELLS = ("", "sh", "bash")
_FENCE = re.compile(r"( *)```(\w*)")
WITH_DEFAULT_MODEL = "<!-- run with the default model -->"
_COMMENT = re.compile(rf"<!-- (not run: needs|not ours:) .+ -->|{WITH_DEFAULT_MODEL}")


class Block(NamedTuple):
    """A fenced block: its language, its text, where that begins, and what is said of it."""

    language: str
    text: str
    line: int  # of its first line of text, from 1
    comment: str  # in the line before: why it is not run, or whose words it has; else empty

    @property
    def is_run(self) -> bool:
        """Whether it needs nothing that a machine with jpaged may lack."""
        return not self.comment.startswith("<!-- not run:")


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found, number = [], 0
    while number < len(lines):
        opening = _FENCE.fullmatch(lines[number])
        if opening is None:
            number += 1
            continue
        indent, language = opening.groups()
        end = lines.index(f"{indent}```", number + 1)
        before = lines[number - 1].strip() if number else ""
        comment = before if _COMMENT.fullmatch(before) else ""
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end])
        found.append(Block(language, text, number + 2, comment))
        number = end + 1
    return found
