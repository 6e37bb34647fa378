"""The committed drawings are what their script makes, in the colours of jpaged's own pictures."""

import importlib.util
import xml.etree.ElementTree as ET
from types import ModuleType

import pytest

from jpaged import marks
from tests.docs.markdown import PAGES, ROOT

LETTER = 6.3  # pixels that a letter takes on average, in the wider ones of the usual fonts


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "drawings" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw = load()


def test_no_drawing_is_missing_or_left_over():
    committed = {path.name for path in draw.IMAGES.iterdir()}
    assert committed == set(draw.drawings())


@pytest.mark.parametrize("name", draw.drawings())
def test_a_committed_drawing_is_what_the_script_makes(name: str):
    committed = (draw.IMAGES / name).read_text(encoding="utf-8")
    assert committed == draw.drawings()[name], "run `python docs/drawings/draw.py`"


@pytest.mark.parametrize("name", draw.drawings())
def test_a_drawing_is_well_formed_and_its_words_stand_within_it(name: str):
    root = ET.fromstring(draw.drawings()[name])
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, text = float(element.attrib["x"]), float(element.attrib["y"]), element.text or ""
        length = LETTER * len(text)
        x -= {"end": length, "middle": length / 2}.get(element.attrib.get("text-anchor", ""), 0)
        assert x >= -8, text
        assert x + length <= width + 8, text
        assert y <= height, text


@pytest.mark.parametrize("name", draw.drawings())
def test_a_drawing_is_shown_on_a_page(name: str):
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert f"images/{name})" in pages


def test_colours_are_those_of_the_pictures():
    assert draw.svg.COLORS == marks.COLORS
