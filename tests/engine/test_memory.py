"""Pool sizing without a flag, and the word about a device that JAX passed over."""

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
import pytest

from jpaged import devices, memory
from jpaged.config import EngineConfig
from jpaged.llm import LLM
from jpaged.loading import engine_for
from jpaged_models import ModelConfig
from pallas_kernels import Backend
from tests.helpers import tiny_config, tiny_decoder
from tests.models.tiny_files import llama_tensors, write_directory


@dataclasses.dataclass
class FakeDevice:
    """A device of a platform, with the memory figures it would report."""

    platform: str
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def _sized(
    device: FakeDevice, *, least: int = 70, wanted: int = 2**60, temporaries: int = 0
) -> int:
    return memory.pool_bytes(
        device, memory_fraction=0.5, temporaries=temporaries, least=least, wanted=wanted
    )


def test_accelerator_pool_is_its_share_less_weights_and_temporaries():
    device = FakeDevice("gpu", {"bytes_limit": 1000, "bytes_in_use": 130})
    assert _sized(device, temporaries=20) == 500 - 130 - 20


def test_accelerator_pool_is_never_more_than_could_be_used():
    device = FakeDevice("tpu", {"bytes_limit": 1000, "bytes_in_use": 130})
    assert _sized(device, wanted=77) == 77


def test_accelerator_without_room_is_refused_with_the_figures():
    device = FakeDevice("gpu", {"bytes_limit": 2**32, "bytes_in_use": 2**31})
    with pytest.raises(ValueError, match=r"memory_fraction=0.5 of 4.0 GiB .* 2.0 GiB are in use"):
        _sized(device)


def test_accelerator_without_room_for_two_blocks_is_refused_with_the_figures():
    device = FakeDevice("gpu", {"bytes_limit": 2**31, "bytes_in_use": 2**30 - 2**21})
    assert _sized(device, least=2**21) == 2**21
    with pytest.raises(ValueError, match=r"leaves 2.0 MiB .* two blocks take 4.0 MiB: 1022.0 MiB"):
        _sized(device, least=2**22)


def test_an_accelerators_pool_leaves_room_for_bent_logits():
    stats = {"bytes_limit": 2**24, "bytes_in_use": 2**20}
    limits: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16}
    engine = engine_for(
        tiny_decoder(tiny_config(vocab_size=50_000)),
        None,
        EngineConfig(block_size=8, num_blocks=2, max_model_len=10**6, **limits),
        pool_dtype=np.float32,
        backend=Backend.XLA,
        device=FakeDevice("gpu", stats),
        memory_fraction=1.0,
    )
    pool = sum(leaf.nbytes for leaf in engine.runner.pool)
    shape = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.step.zero_shape()))
    assert shape > 4 * 50_000 * 9
    assert 0 < pool < 2**24 - 2**20 - shape


def test_cpu_without_room_for_two_blocks_names_what_can_be_set(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * 2**20)
    assert _sized(FakeDevice("cpu", None), least=25 * 2**20) == 25 * 2**20
    with pytest.raises(ValueError, match=r"take 100.0 MiB .* take 26.0 MiB; set num_blocks"):
        _sized(FakeDevice("cpu", None), least=26 * 2**20)


def test_cpu_pool_is_a_quarter_of_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 4000)
    assert _sized(FakeDevice("cpu", None)) == 1000
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**50)
    assert _sized(FakeDevice("cpu", None)) == memory.MAX_CPU_POOL_BYTES
    monkeypatch.setattr(memory, "available_bytes", lambda: None)  # the system does not say
    assert _sized(FakeDevice("cpu", None)) == memory.ASSUMED_BYTES // memory.CPU_SHARE


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_blocks_that_were_asked_for_must_fit_what_is_free(monkeypatch, platform: str):
    stats = {"bytes_limit": 9 * 2**30, "bytes_in_use": 4 * 2**30} if platform == "gpu" else None
    monkeypatch.setattr(memory, "available_bytes", lambda: 5 * 2**30)
    memory.check_room(FakeDevice(platform, stats), num_blocks=5, size=2**30)
    with pytest.raises(ValueError, match=r"num_blocks=6 .* 1.0 GiB take 6.0 GiB, and 5.0 GiB are"):
        memory.check_room(FakeDevice(platform, stats), num_blocks=6, size=2**30)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.check_room(FakeDevice("cpu", None), num_blocks=6, size=2**60)  # nobody knows


def test_swap_space_must_be_free_and_hold_a_block(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 5 * 2**30)
    assert memory.swap_blocks(0.0, size=2**20) == 0
    assert memory.swap_blocks(0.25, size=2**28) == 1
    with pytest.raises(ValueError, match=r"swap_space=0.2 GiB holds no block, .* 256.0 MiB"):
        memory.swap_blocks(0.2, size=2**28)
    with pytest.raises(ValueError, match=r"swap_space=6 GiB of host memory, and 5.0 GiB are free"):
        memory.swap_blocks(6, size=2**20)


def test_blocks_beyond_memory_are_refused_before_weights_load(tmp_path, monkeypatch):
    directory = write_directory(tmp_path / "tiny", llama_tensors())
    monkeypatch.setattr("jpaged.loading.load_decoder", None)
    with pytest.raises(ValueError, match=r"num_blocks=1099511627776 .* lower num_blocks"):
        LLM(directory, num_blocks=2**40)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """A system without Linux's files about memory."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "no such file")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "no such folder")


@pytest.mark.usefixtures("elsewhere")
def test_outside_linux_the_memory_built_in_counts(monkeypatch):
    sizes = {"SC_PHYS_PAGES": 3000, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert memory.available_bytes() == 3000 * 16384
    assert _sized(FakeDevice("cpu", None)) == 3000 * 16384 // 4


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError])
def test_a_system_that_says_nothing_gets_a_small_pool(monkeypatch, error: type[Exception]):
    def sysconf(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert memory.available_bytes() is None
    assert _sized(FakeDevice("cpu", None)) == 2**29


@pytest.mark.usefixtures("elsewhere")
def test_a_kernel_without_that_line_counts_as_another_system(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(os, "sysconf", lambda _: 50)
    assert memory.available_bytes() == 2500


@pytest.mark.parametrize(
    ("limit_file", "usage_file", "details_file", "cached"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_cgroup_limit_counts_where_it_is_lower(
    tmp_path, monkeypatch, limit_file, usage_file, details_file, cached
):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 5000 * 1024
    (tmp_path / limit_file).parent.mkdir(exist_ok=True)
    (tmp_path / limit_file).write_text("3000000\n")
    (tmp_path / usage_file).write_text("1000000\n")
    assert memory.available_bytes() == 2000000
    # Pages of files that nobody reads now go as soon as somebody needs their room.
    (tmp_path / details_file).write_text(f"anon 300\n{cached} 600000\nactive_file 5000\n")
    assert memory.available_bytes() == 2600000
    (tmp_path / limit_file).write_text("max\n")
    assert memory.available_bytes() == 5000 * 1024
    (tmp_path / limit_file).write_text("1000\n")
    assert memory.available_bytes() == 0


def test_block_bytes_are_those_of_the_pool(small_config: ModelConfig):
    # 3 layers, 2 KV heads, blocks of 8, K and V of 16 lanes, 2 bytes each
    size = functools.partial(memory.block_bytes, small_config, block_size=8, dtype="bfloat16")
    assert size(backend=Backend.XLA) == 3 * 2 * 8 * 32 * 2
    assert size(backend=Backend.PALLAS_TPU) == 3 * 2 * 8 * 128 * 2, "a row is a whole register"


def test_plugin_that_does_not_fit_is_an_error_and_not_a_silent_cpu(tmp_path, monkeypatch):
    device_file = tmp_path / "accel3"
    device_file.touch()
    pattern = str((tmp_path / "accel[0-9]*").relative_to("/"))
    monkeypatch.setattr(devices, "_PLUGINS", (("numpy", "cuda13", pattern),))
    chosen = jax.config.values["jax_platforms"]
    jax.devices()  # the backend is up, so the setting below chooses nothing any more
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(RuntimeError, match=r"numpy .*pip install -U '\.\[cuda13\]'"):
            devices.first_device()
        device_file.unlink()
        assert devices.first_device().platform == "cpu"
    finally:
        jax.config.update("jax_platforms", chosen)


@pytest.fixture
def small_config() -> ModelConfig:
    return tiny_config(
        num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, layer_windows=(None,) * 3
    )
