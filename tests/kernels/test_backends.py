"""Which devices the kernels are chosen for, and which pools they take."""

from typing import NamedTuple

import jax
import pytest

from pallas_kernels import (
    Backend,
    backends,
    check_pool_of,
    choose_backend,
    default_backend,
)


class Gpu(NamedTuple):
    """What is asked of a device."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "Tesla T4"


class Tpu(NamedTuple):
    """What is asked of another."""

    device_kind: str
    platform: str = "tpu"


def use(monkeypatch: pytest.MonkeyPatch, device: Gpu | Tpu) -> None:
    backends._warn_once.cache_clear()
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0", "12.1"])
def test_a_gpu_that_runs_triton_gets_the_kernels(monkeypatch: pytest.MonkeyPatch, capability: str):
    use(monkeypatch, Gpu(capability))
    assert default_backend() is Backend.PALLAS_GPU
    assert choose_backend("auto", "gpu") is choose_backend("pallas-gpu", "gpu")


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x"])
def test_a_tpu_gets_the_kernels(monkeypatch: pytest.MonkeyPatch, kind: str):
    use(monkeypatch, Tpu(kind))
    assert default_backend() is Backend.PALLAS_TPU
    assert choose_backend("auto", "tpu") is choose_backend("pallas-tpu", "tpu")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Gpu("7.5"), "they need compute capability 8.0, Tesla T4 has 7.5"),
        (Gpu("gfx942"), "they need compute capability 8.0, Tesla T4 has gfx942"),
        (Tpu("TPU v2"), "they need a TPU v4 or later, this is a TPU v2"),
        (Tpu("TPU v3"), "they need a TPU v4 or later, this is a TPU v3"),
    ],
    ids=str,
)
def test_another_device_gets_xla_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: Gpu | Tpu,
    reason: str,
):
    use(monkeypatch, device)
    platform = device.platform
    assert default_backend() is default_backend(platform) is Backend.XLA
    assert caplog.messages == [
        f"attention by xla, the {platform.upper()} kernels cannot run: {reason}"
    ]
    assert choose_backend("auto", platform) is Backend.XLA
    name = f"pallas-{platform}"
    with pytest.raises(ValueError, match=f"'{name}' cannot run: {reason}; use 'xla'"):
        choose_backend(name, platform)


@pytest.mark.parametrize(
    ("block_size", "dtype", "message"),
    [
        (12, "bfloat16", "block size must be a multiple of 8, got 12; or use `xla`"),
        (16, "float16", "the pool must be one of .* got float16; or use `xla`"),
    ],
)
def test_a_pool_that_a_tpu_does_not_take_is_refused_before_it_is_there(
    block_size: int, dtype: str, message: str
):
    check_pool_of(Backend.XLA, block_size=block_size, dtype=dtype, head_size=64)
    check_pool_of(Backend.PALLAS_TPU, block_size=16, dtype="bfloat16", head_size=64)
    with pytest.raises(ValueError, match=message):
        check_pool_of(Backend.PALLAS_TPU, block_size=block_size, dtype=dtype, head_size=64)


def test_float8_on_a_gpu_that_cannot_convert_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, Gpu("8.9"))
    check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="float8_e4m3fn", head_size=64)
    use(monkeypatch, Gpu("8.0"))
    check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="int8", head_size=64)
    with pytest.raises(ValueError, match=r"capability 8\.9, this GPU has 8\.0; take int8, or use"):
        check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="float8_e4m3fn", head_size=64)
