"""The one place that chooses a backend."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import reference, xla
from pallas_kernels.layout import PagedBatch
from pallas_kernels.tpu import decode as tpu_decode


class Backend(enum.Enum):
    """Which code computes attention over the pool."""

    REFERENCE = "reference"
    XLA = "xla"
    PALLAS_TPU = "pallas-tpu"
    PALLAS_TPU_INTERPRET = "pallas-tpu-interpret"  # the TPU kernel simulated, for tests


def default_backend(platform: str | None = None) -> Backend:
    """The best backend of a platform ("tpu", "gpu", "cpu"; by default the first device's)."""
    platform = platform or jax.devices()[0].platform
    return Backend.PALLAS_TPU if platform == "tpu" else Backend.XLA


def paged_decode(
    q: Float[Array, "B N H"],
    pool: Float[Array, "P K S W"],
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend,
) -> Float[Array, "B N H"]:
    """Attention over the pool of one query token a row, the token at position `seq_lens - 1`.

    Its K and V are in the pool already. A row of length 0 is padding and gives zeros. With
    `window`, a token sees itself and the `window - 1` before it; with `soft_cap`, logits pass
    through `soft_cap * tanh(logits / soft_cap)`.
    """
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if backend in (Backend.PALLAS_TPU, Backend.PALLAS_TPU_INTERPRET):
        interpret = backend is Backend.PALLAS_TPU_INTERPRET
        return tpu_decode.paged_decode(
            q, pool, block_tables, seq_lens, interpret=interpret, **options
        )
    decode = reference.paged_decode if backend is Backend.REFERENCE else xla.paged_decode
    return decode(q, pool, block_tables, seq_lens, **options)


def paged_attention(
    q: Float[Array, "T N H"],
    pool: Float[Array, "P K S W"],
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend,
) -> Float[Array, "T N H"]:
    """Causal attention over the pool of a ragged batch (`PagedBatch` says how it is laid out).

    The T axis is at least as long as the B axis. Rows of one token go to `paged_decode`'s kernel.
    """
    if backend is Backend.REFERENCE:
        return reference.paged_attention(
            q, pool, batch, scale=scale, window=window, soft_cap=soft_cap
        )
    B = batch.seq_lens.shape[0]
    decode_lens = jnp.where(jnp.arange(B) < batch.num_decodes, batch.seq_lens, 0)
    decoded = paged_decode(
        q[:B],
        pool,
        batch.block_tables,
        decode_lens,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        backend=backend,
    )
    return xla.paged_prefill(q, pool, batch, decoded, scale=scale, window=window, soft_cap=soft_cap)


def write_kv(
    pool: Float[Array, "P K S W"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slots: Int32[Array, " T"],
    *,
    backend: Backend,
) -> Float[Array, "P K S W"]:
    """The pool with each token's K and V in slot `block * S + offset`.

    Several tokens may name the null block; other slots are distinct.
    """
    if backend is Backend.REFERENCE:
        return reference.write_kv(pool, k, v, slots)
    return xla.write_kv(pool, k, v, slots)
