"""Pool sizing without a flag, and the word about a device that JAX passed over."""

import dataclasses

import jax
import pytest

from jpaged import devices, memory
from jpaged_models import ModelConfig
from tests.helpers import tiny_config


@dataclasses.dataclass
class FakeDevice:
    """A device of a platform, with the memory figures it would report."""

    platform: str
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def _sized(device: FakeDevice, *, wanted: int = 2**60, temporaries: int = 0) -> int:
    return memory.pool_bytes(device, memory_fraction=0.5, temporaries=temporaries, wanted=wanted)


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


def test_cpu_pool_is_a_quarter_of_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 4000)
    assert _sized(FakeDevice("cpu", None)) == 1000
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**50)
    assert _sized(FakeDevice("cpu", None)) == memory.MAX_CPU_POOL_BYTES


@pytest.mark.parametrize(
    ("limit_file", "usage_file"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_cgroup_limit_counts_where_it_is_lower(tmp_path, monkeypatch, limit_file, usage_file):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 5000 * 1024
    (tmp_path / limit_file).parent.mkdir(exist_ok=True)
    (tmp_path / limit_file).write_text("3000000\n")
    (tmp_path / usage_file).write_text("1000000\n")
    assert memory.available_bytes() == 2000000
    (tmp_path / limit_file).write_text("1000\n")
    assert memory.available_bytes() == 0


def test_block_bytes_are_those_of_the_pool(small_config: ModelConfig):
    # 3 layers, 2 KV heads, blocks of 8, K and V of 16 lanes, 2 bytes each
    assert memory.block_bytes(small_config, block_size=8, dtype="bfloat16") == 3 * 2 * 8 * 32 * 2


def test_plugin_that_does_not_fit_is_an_error_and_not_a_silent_cpu(tmp_path, monkeypatch):
    device_file = tmp_path / "nvidiactl"
    device_file.touch()
    monkeypatch.setattr(devices, "_PLUGINS", (("numpy", "cuda13", str(device_file)),))
    chosen = jax.config.values["jax_platforms"]
    jax.devices()  # the backend is up, so the setting below chooses nothing any more
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(RuntimeError, match=r"numpy .*pip install -U 'jpaged\[cuda13\]'"):
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
