"""What the check of a GPU says of changes of the pool, timed or not, and of large pools."""

import dataclasses
import json
from typing import Any

import pytest

from benchmarks.gpu import changes, large, writes
from benchmarks.gpu.settings import Record, Settings
from pallas_kernels import Backend

SETTINGS = Settings(backend="xla", scale="toy", seed=3, candidates=[], read_gbps=10.0)


def test_writes_are_timed_every_way_and_are_right():
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret")
    record = Record()
    found = record.results
    writes.run(settings, record)
    assert {name.split()[-1] for name in found} == {
        "kernel",
        "scatter",
        "repeated",
        "xla",
        settings.backend,
    }
    assert all(result["ok"] and result["us"] > 0 for result in found.values()), found
    json.dumps(found)


def test_a_write_to_a_wrong_slot_is_found(monkeypatch: pytest.MonkeyPatch):
    right = writes.write_by_kernel
    monkeypatch.setattr(
        writes,
        "write_by_kernel",
        lambda pool, k, v, slots, **rest: right(pool, k, v, slots ^ 1, **rest),
    )
    settings = dataclasses.replace(SETTINGS, backend="pallas-gpu-interpret", only="5 bfloat16")
    record = Record()
    found = record.results
    writes.run(settings, record)
    wrong = [name for name, result in found.items() if not result["ok"]]
    assert wrong == [name for name in found if name.endswith("kernel")]


def test_what_raises_while_the_pool_is_changed_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(changes, "write_kv", breaks)
    record = Record()
    changes.check(Backend.XLA, SETTINGS, record)
    wrong = [name for name, result in record.results.items() if not result["ok"]]
    writes_alone = [f"write_kv {dtype}" for dtype in changes.DTYPES]
    ends = [f"both at the end of a large pool {dtype}" for dtype in ("bfloat16", "int8")]
    assert wrong == [*writes_alone, *ends]
    assert sum(name.startswith("copy_blocks") for name in record.results) == len(changes.DTYPES)


@pytest.mark.parametrize("name", ["write_kv", "copy_blocks"])
def test_a_wrong_change_is_found_in_every_dtype(monkeypatch: pytest.MonkeyPatch, name: str):
    right = getattr(changes, name)

    def wrong(pool: Any, first: Any, *rest: Any, **options: Any) -> Any:
        if name == "copy_blocks":
            return right(pool, first[::-1], *rest, **options)
        return right(pool, first, *rest[:-1], rest[-1] ^ 1, **options)

    monkeypatch.setattr(changes, name, wrong)
    record = Record()
    changes.check(Backend.XLA, SETTINGS, record)
    found = {key: result for key, result in record.results.items() if key.startswith(name)}
    assert len(found) == len(changes.DTYPES)
    assert not any(result["ok"] for result in found.values()), found


def test_large_pools_are_as_large_as_offsets_allow_and_are_left_out_by_name():
    shape = (40, 2, 16, 128)
    elements = 2 * 16 * 128
    assert 0 <= large.MOST_ELEMENTS - large.blocks_of(shape, "int8", "full") * elements < elements
    assert (large.blocks_of(shape, "bfloat16", "full") - 40) * elements >= 2**31
    record = Record()
    full = dataclasses.replace(SETTINGS, scale="full")
    assert list(large.cases(Backend.XLA, full, record)) == []  # a CPU says not how much it has
    assert len(record.results) == 4
    for result in record.results.values():
        assert result["ok"]
        assert "GiB of memory, there are an unknown number" in result["error"]
