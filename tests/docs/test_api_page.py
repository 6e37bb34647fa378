"""The page of the API has every public name, and none that is not."""

import re

import pytest

import jpaged
import pallas_kernels
from tests.docs.markdown import ROOT

PUBLIC = [
    *(("jpaged", name) for name in jpaged.__all__),
    *(("pallas_kernels", name) for name in pallas_kernels.__all__),
]
SHOWN = [
    tuple(found)
    for found in re.findall(
        r"^::: (\w+)\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_is_shown(package: str, name: str):
    assert (package, name) in SHOWN


def test_nothing_else_is_shown():
    assert set(SHOWN) == set(PUBLIC)
    assert len(SHOWN) == len(set(SHOWN))
