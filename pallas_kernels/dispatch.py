"""The one place that chooses a backend, and checks what they all ask."""

import enum
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels import reference, xla
from pallas_kernels.cpu import attention as cpu
from pallas_kernels.cpu.build import BuildError
from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.gpu import ragged as gpu_ragged
from pallas_kernels.layout import PagedBatch, decode_batch
from pallas_kernels.quantize import LARGEST, is_quantized, quantize
from pallas_kernels.tpu import decode as tpu_decode
from pallas_kernels.tpu import ragged as tpu_ragged
from pallas_kernels.tpu import write as tpu_write

logger = logging.getLogger(__name__)  # unconfigured, Python prints its warnings on stderr


class Backend(enum.Enum):
    """Which code computes attention over the pool."""

    REFERENCE = "reference"
    XLA = "xla"
    CPU = "cpu"  # C++ through jax.ffi, compiled on this machine
    PALLAS_TPU = "pallas-tpu"
    PALLAS_TPU_INTERPRET = "pallas-tpu-interpret"  # the TPU kernel simulated, for tests
    PALLAS_GPU = "pallas-gpu"
    PALLAS_GPU_INTERPRET = "pallas-gpu-interpret"  # the GPU kernel on any device, for tests


MIN_SCALE = 1e-6  # and its inverse: beyond, a masked logit is no longer the lowest
MIN_CAPABILITY = 8.0  # of a GPU: XLA compiles no Triton below
TPU_BACKENDS = (Backend.PALLAS_TPU, Backend.PALLAS_TPU_INTERPRET)
GPU_BACKENDS = (Backend.PALLAS_GPU, Backend.PALLAS_GPU_INTERPRET)


def default_backend(platform: str | None = None) -> Backend:
    """The best backend of a platform ("tpu", "gpu", "cpu"; by default the first device's)."""
    platform = platform or jax.devices()[0].platform
    if platform == "cpu":
        try:
            cpu.register()
        except BuildError as reason:
            _warn_once(f"attention by xla, the CPU kernel is missing: {reason}")
        else:
            return Backend.CPU
    if platform == "gpu":
        reason = _unfit_gpu()
        if reason is None:
            return Backend.PALLAS_GPU
        _warn_once(f"attention by xla, the GPU kernels cannot run: {reason}")
    return Backend.PALLAS_TPU if platform == "tpu" else Backend.XLA


def choose_backend(name: str, platform: str) -> Backend:
    """The backend of a name; "auto" is the platform's default.

    Raises ValueError for a name that does not exist or cannot run on the platform.
    """
    if name == "auto":
        return default_backend(platform)
    try:
        backend = Backend(name)
    except ValueError:
        names = ["auto", *(backend.value for backend in Backend)]
        raise ValueError(f"attention_backend must be one of {names}, got {name!r}") from None
    needs = {Backend.CPU: "cpu", Backend.PALLAS_TPU: "tpu", Backend.PALLAS_GPU: "gpu"}
    needed = needs.get(backend, platform)
    if platform != needed:
        raise ValueError(f"attention_backend={name!r} needs a {needed}, this is a {platform}")
    if backend is Backend.CPU:
        try:
            cpu.register()
        except BuildError as reason:
            raise ValueError(f"attention_backend='cpu' cannot be compiled: {reason}") from reason
    if backend is Backend.PALLAS_GPU and (reason := _unfit_gpu()):
        raise ValueError(f"attention_backend='pallas-gpu' cannot run: {reason}; use 'xla'")
    return backend


def _unfit_gpu() -> str | None:
    """Why the GPU kernels cannot run on the first device, or None."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    try:
        fits = float(capability) >= MIN_CAPABILITY
    except ValueError:  # AMD's are names
        fits = False
    if fits:
        return None
    return (
        f"they need compute capability {MIN_CAPABILITY}, "
        f"{device.device_kind} has {capability or 'none'}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def paged_decode(
    q: Float[Array, "B N H"],
    pool: Real[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    backend: Backend,
) -> Float[Array, "B N H"]:
    """Attention over the pool of one query token a row, the token at position `seq_lens - 1`.

    Its K and V are in the pool already. A row of length 0 is padding and gives zeros. With
    `window`, a token sees itself and the `window - 1` before it; with `soft_cap`, logits pass
    through `soft_cap * tanh(logits / soft_cap)`.

    `sinks` are logits, one for each query head, that take weight and bring no value: a head's
    weights are `exp(logits) / (sum(exp(logits)) + exp(sink))`. They are neither scaled nor capped.
    gpt-oss learns them (its model card, arXiv 2508.10925); attention sinks are from StreamingLLM
    (arXiv 2309.17453).

    A pool of int8 or float8_e4m3fn needs `kv_scales`, for keys in row 0 and for values in row 1:
    what stands in the pool, times its head's scale, is the key or the value.
    """
    _check(q, pool, scale, window, soft_cap)
    _check_scales(pool, kv_scales)
    options = _given(
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, kv_scales=kv_scales
    )
    if backend in TPU_BACKENDS:
        interpret = backend is Backend.PALLAS_TPU_INTERPRET
        return tpu_decode.paged_decode(
            q, pool, block_tables, seq_lens, interpret=interpret, **options
        )
    if backend in GPU_BACKENDS:
        interpret = backend is Backend.PALLAS_GPU_INTERPRET
        return gpu_decode.paged_decode(
            q, pool, block_tables, seq_lens, interpret=interpret, **options
        )
    if backend is Backend.XLA:
        return xla.paged_decode(q, pool, block_tables, seq_lens, **options)
    batch = decode_batch(block_tables, seq_lens)
    return paged_attention(q, pool, batch, backend=backend, **options)


def paged_attention(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    backend: Backend,
) -> Float[Array, "T N H"]:
    """Causal attention over the pool of a ragged batch (`PagedBatch` says how it is laid out).

    The T axis is at least as long as the B axis. Where no kernel takes ragged rows, rows of one
    token go to `paged_decode`'s, which says what the options are.
    """
    _check(q, pool, scale, window, soft_cap)
    _check_scales(pool, kv_scales)
    _check_batch(q, batch)
    options = _given(
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, kv_scales=kv_scales
    )
    if backend in (Backend.REFERENCE, Backend.CPU):
        module = reference if backend is Backend.REFERENCE else cpu
        return module.paged_attention(q, pool, batch, **options)
    B = batch.seq_lens.shape[0]
    decode_lens = jnp.where(jnp.arange(B) < batch.num_decodes, batch.seq_lens, 0)
    decoded = paged_decode(q[:B], pool, batch.block_tables, decode_lens, backend=backend, **options)
    if backend in GPU_BACKENDS:
        interpret = backend is Backend.PALLAS_GPU_INTERPRET
        return gpu_ragged.paged_prefill(q, pool, batch, decoded, interpret=interpret, **options)
    if backend in TPU_BACKENDS:
        interpret = backend is Backend.PALLAS_TPU_INTERPRET
        return tpu_ragged.paged_prefill(q, pool, batch, decoded, interpret=interpret, **options)
    return xla.paged_prefill(q, pool, batch, decoded, **options)


def write_kv(
    pool: Real[Array, "P K S W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, " T"],
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    backend: Backend,
) -> Real[Array, "P K S W"]:
    """The pool with each token's K and V in slot `block * S + offset`.

    Several tokens may name the null block; other slots are distinct. A quantised pool gets them by
    `kv_scales` (`paged_decode` says which), rounded to the nearest and cut to what its dtype keeps.
    """
    _check_scales(pool, kv_scales)
    if kv_scales is None:
        kv = jnp.concatenate([k, v], axis=-1).astype(pool.dtype)
    else:
        kv = quantize(k, v, kv_scales, pool.dtype)
    if backend in TPU_BACKENDS:
        interpret = backend is Backend.PALLAS_TPU_INTERPRET
        return tpu_write.write_kv(pool, kv, slots, interpret=interpret)
    module = reference if backend is Backend.REFERENCE else xla
    return module.write_kv(pool, kv, slots)


def copy_blocks(
    pools: tuple[Real[Array, "P K S W"], ...], copies: Int32[Array, "X 2"], count: Int32[Array, ""]
) -> tuple[Real[Array, "P K S W"], ...]:
    """Every layer's pool after the first `count` of the (source, destination) block copies.

    They are done in order: a destination may have been the source of a copy before it.
    """
    return xla.copy_blocks(pools, copies, count)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None, which is every backend's default: it may lack what nobody asks."""
    return {name: value for name, value in options.items() if value is not None}


def _check(
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Raises ValueError where no backend has an answer; a backend adds its own limits."""
    _, N, H = q.shape
    _, K, S, W = pool.shape
    if W != 2 * H:
        raise ValueError(
            f"a pool row holds K and V, 2 x {H} lanes for this query, got {W}; "
            f"make the pool with pool_shape(head_size={H})"
        )
    if not K or N % K:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {N} and {K}; "
            "a query is [T, N, H] and a pool [P, K, S, 2H]"
        )
    if not S:
        raise ValueError(f"a block must have at least one slot, got a pool of {pool.shape}")
    if not MIN_SCALE <= scale <= 1 / MIN_SCALE:
        raise ValueError(
            f"scale must be from {MIN_SCALE} to {1 / MIN_SCALE:g}, got {scale}; "
            "it is 1 / sqrt(head size) in most models"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 (the token itself), got {window}; None is no window"
        )
    float32 = jnp.finfo(jnp.float32)
    if soft_cap is not None and not float32.tiny <= soft_cap <= float32.max:
        raise ValueError(
            f"soft_cap must be positive and finite in float32, got {soft_cap}; None is no cap"
        )


def _check_scales(pool: Real[Array, "P K S W"], kv_scales: Float[Array, "2 K"] | None) -> None:
    """Raises ValueError where the pool's dtype and its scales do not go together."""
    name, quantized = pool.dtype.name, is_quantized(pool.dtype)
    if not quantized and (pool.dtype.itemsize == 1 or not jnp.issubdtype(pool.dtype, jnp.floating)):
        raise ValueError(
            f"a pool is of floating point, or quantised as {' or '.join(LARGEST)}, got {name}; "
            "make it of one of these"
        )
    if quantized and kv_scales is None:
        raise ValueError(
            f"a pool of {name} needs kv_scales of shape (2, {pool.shape[1]}), got None; "
            "kv_scales_of finds them from keys and values"
        )
    if not quantized and kv_scales is not None:
        raise ValueError(
            f"kv_scales are for a pool of {' or '.join(LARGEST)}, got one of {name}; leave them out"
        )


def _check_batch(q: Float[Array, "T N H"], batch: PagedBatch) -> None:
    T, B = q.shape[0], batch.block_tables.shape[0]
    num_starts, num_lens = batch.query_starts.shape[0], batch.seq_lens.shape[0]
    if (num_starts, num_lens) != (B + 1, B):
        raise ValueError(
            f"a batch of {B} block tables needs {B + 1} query_starts and {B} seq_lens, "
            f"got {num_starts} and {num_lens}"
        )
    if T < B:
        raise ValueError(f"q must have a token for each of {B} rows, got {T}; pad its T axis")
