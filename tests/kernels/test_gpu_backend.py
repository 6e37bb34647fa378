"""Which GPUs the GPU kernels are chosen for."""

from typing import NamedTuple

import jax
import pytest

from pallas_kernels import Backend, choose_backend, default_backend, dispatch


class Gpu(NamedTuple):
    """What is asked of a device."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "Tesla T4"


def use(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    dispatch._warn_once.cache_clear()
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0", "12.1"])
def test_a_gpu_that_runs_triton_gets_the_kernels(monkeypatch: pytest.MonkeyPatch, capability: str):
    use(monkeypatch, capability)
    assert default_backend() is Backend.PALLAS_GPU
    assert choose_backend("auto", "gpu") is choose_backend("pallas-gpu", "gpu")


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_another_gpu_gets_xla_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: str
):
    use(monkeypatch, capability)
    assert default_backend() is default_backend("gpu") is Backend.XLA
    assert caplog.messages == [
        "attention by xla, the GPU kernels cannot run: "
        f"they need compute capability 8.0, Tesla T4 has {capability}"
    ]
    assert choose_backend("auto", "gpu") is Backend.XLA
    with pytest.raises(ValueError, match=f"cannot run: .* has {capability}; use 'xla'"):
        choose_backend("pallas-gpu", "gpu")
