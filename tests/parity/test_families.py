"""Every family against Transformers itself: the committed goldens are what it says today."""

import pytest

from tests.helpers import TOLERANCES, assert_close
from tests.models.families import FAMILIES, load_golden

pytest.importorskip("transformers", reason="make test-parity installs Transformers and PyTorch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", FAMILIES)
def test_committed_golden_is_what_transformers_computes(name):
    from tests.models.make_family_goldens import transformers_golden

    committed, live = load_golden(name), transformers_golden(name)
    assert committed.shapes == live.shapes
    for found, expected in zip(committed.logits, live.logits, strict=True):
        assert_close(found, expected, TOLERANCES["float32"].logits, name)
