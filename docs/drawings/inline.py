"""A hook of mkdocs: drawings stand in the page itself, so that their words take its colour."""

import pathlib
import re
from typing import Any

_IMAGE = re.compile(r'<img[^>]*src="[^"]*images/([a-z_]+\.svg)"[^>]*>')
_IMAGES = pathlib.Path(__file__).parents[1] / "images"


def on_page_content(html: str, **_: Any) -> str:
    """The page with each drawing in place of the tag that names it."""
    return _IMAGE.sub(lambda found: (_IMAGES / found[1]).read_text(encoding="utf-8"), html)
