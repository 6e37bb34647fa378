"""The benchmark of loading: a process of its own is watched from outside."""

import pytest

from benchmarks import load_memory
from benchmarks.process_memory import memory_bytes

pytestmark = pytest.mark.skipif(
    memory_bytes("RssAnon") is None, reason="this system does not tell a process's memory by kind"
)


def test_a_load_is_watched_while_it_holds_its_weights():
    found = load_memory.load("tiny", "float32")
    assert found["weights_bytes"] == 4 * 3_148_224
    assert found["peak_bytes"] > found["weights_bytes"]


def test_a_load_that_fails_ends_the_command():
    with pytest.raises(SystemExit, match="a load failed; its words are above"):
        load_memory.load("no-such.gguf", "float32")
