"""Which devices the kernels are chosen for, and which pools they take."""

import contextlib
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Backend,
    backends,
    check_pool_of,
    choose_backend,
    default_backend,
    paged_attention,
    paged_decode,
)
from pallas_kernels.layout import decode_batch


class Gpu(NamedTuple):
    """What is asked of a device."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "Tesla T4"


class Tpu(NamedTuple):
    """What is asked of another."""

    device_kind: str
    platform: str = "tpu"


def compiled_for(kind: str | None) -> contextlib.AbstractContextManager:
    """While it lasts, what is traced is for that GPU, or for the first device."""
    if kind is None:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(kind, 100, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


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


@pytest.mark.parametrize("backend", [Backend.MOSAIC_GPU, Backend.MOSAIC_GPU_INTERPRET])
def test_more_queries_a_head_than_the_kernels_for_hopper_take_are_refused(backend: Backend):
    given: Any = {"block_size": 16, "dtype": "bfloat16", "head_size": 64}
    check_pool_of(backend, queries_per_head=64, **given)
    message = "takes at most 64 queries a KV head, got 65; use pallas-gpu"
    with pytest.raises(ValueError, match=message):
        check_pool_of(backend, queries_per_head=65, **given)
    check_pool_of(Backend.PALLAS_GPU_INTERPRET, queries_per_head=65, **given)


@pytest.mark.parametrize(
    ("version", "target", "message"),
    [
        ((0, 11, 1), "NVIDIA H100", r"they need JAX 0\.11\.2, this is .*; use pallas-gpu"),
        ((0, 12, 0), "NVIDIA A100", r"9\.0 \(Hopper\), NVIDIA A100 has 8\.0; use pallas-gpu"),
        (
            (0, 12, 0),
            None,
            r"needs compute capability 9\.0 \(Hopper\), cpu has none; use pallas-gpu",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("job", ["decode", "attention"])
def test_the_kernels_for_hopper_say_what_they_miss_before_they_are_imported(
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, ...],
    target: str | None,
    message: str,
    job: str,
):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setitem(sys.modules, "pallas_kernels.gpu.mosaic.decode", None)
    q, pool = jnp.zeros((2, 4, 64), "bfloat16"), jnp.zeros((3, 2, 16, 128), "bfloat16")
    batch = decode_batch(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    rows = (batch.block_tables, batch.seq_lens) if job == "decode" else (batch,)
    attend = paged_decode if job == "decode" else paged_attention
    with compiled_for(target), pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(attend, scale=1.0, backend=Backend.MOSAIC_GPU), q, pool, *rows
        )


@pytest.mark.parametrize("attend", ["decode", "prefill"])
def test_float8_is_refused_for_a_target_that_cannot_convert_it(attend: str):
    q, pool = jnp.zeros((2, 4, 64), "bfloat16"), jnp.zeros((3, 2, 16, 128), "float8_e4m3fn")
    batch = decode_batch(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    rows = (batch.block_tables, batch.seq_lens) if attend == "decode" else (batch,)
    call = functools.partial(
        paged_decode if attend == "decode" else paged_attention,
        scale=1.0,
        kv_scales=jnp.ones((2, 2)),
        backend=Backend.PALLAS_GPU,
    )
    with compiled_for("NVIDIA A100"), pytest.raises(ValueError, match=r"8\.9, this GPU has 8\.0"):
        jax.eval_shape(call, q, pool, *rows)
    with compiled_for("NVIDIA L4"):
        jax.eval_shape(call, q, pool, *rows)


def test_what_is_interpreted_says_so():
    interpreted = [backend for backend in Backend if backend.is_interpreted]
    assert interpreted == [
        Backend.PALLAS_TPU_INTERPRET,
        Backend.PALLAS_GPU_INTERPRET,
        Backend.MOSAIC_GPU_INTERPRET,
    ]


def test_float8_on_a_gpu_that_cannot_convert_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, Gpu("8.9"))
    check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="float8_e4m3fn", head_size=64)
    use(monkeypatch, Gpu("8.0"))
    check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="int8", head_size=64)
    with pytest.raises(ValueError, match=r"capability 8\.9, this GPU has 8\.0; take int8, or use"):
        check_pool_of(Backend.PALLAS_GPU, block_size=16, dtype="float8_e4m3fn", head_size=64)
