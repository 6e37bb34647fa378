"""The shortest readable oracle of each job, in float32: what every other backend must equal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Real

from pallas_kernels.layout import MASKED, PagedBatch


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
) -> Float[Array, "T N H"]:
    """Causal attention of a ragged batch over the pool, one token at a time."""
    T, N, H = q.shape
    _, K, S, _ = pool.shape
    C = batch.block_tables.shape[1] * S
    context = jnp.arange(C)

    def attend(token: Int32[Array, ""]) -> Float[Array, "N H"]:
        row = jnp.sum(batch.query_starts[1:] <= token)  # the number of rows for a padding token
        table = batch.block_tables.at[row].get(mode="fill", fill_value=0)
        position = batch.seq_lens[row] - batch.query_starts[row + 1] + token
        visible_C = context <= position
        if window is not None:
            visible_C &= context > position - window
        kv = jnp.moveaxis(pool[table], 1, 0).reshape(K, C, 2 * H).astype(jnp.float32)
        kv = jnp.where(visible_C[None, :, None], kv, 0)  # unused slots may hold NaN
        if kv_scales is not None:
            kv *= jnp.repeat(kv_scales, H, axis=0).T[:, None, :]
        q_KGH = q[token].reshape(K, N // K, H).astype(jnp.float32)
        logits_KGC = jnp.einsum("KGH,KCH->KGC", q_KGH, kv[..., :H]) * scale
        if soft_cap is not None:
            logits_KGC = soft_cap * jnp.tanh(logits_KGC / soft_cap)
        logits_KGC = jnp.where(visible_C[None, None, :], logits_KGC, MASKED)
        if sinks is not None:
            sinks_KG1 = sinks.reshape(K, N // K, 1).astype(jnp.float32)
            logits_KGC = jnp.concatenate([logits_KGC, sinks_KG1], axis=-1)
        weights_KGC = jax.nn.softmax(logits_KGC)[..., :C]
        out = jnp.einsum("KGC,KCH->KGH", weights_KGC, kv[..., H:]).reshape(N, H)
        return jnp.where(row < batch.seq_lens.shape[0], out, 0).astype(q.dtype)

    return jax.lax.map(attend, jnp.arange(T))


def write_kv(
    pool: Real[Array, "P K S W"], kv: Real[Array, "T K W"], slots: Int32[Array, " T"]
) -> Real[Array, "P K S W"]:
    """The pool with each token's K|V row in its slot."""
    S = pool.shape[2]

    def write(token: Int32[Array, ""], pool: Real[Array, "P K S W"]) -> Real[Array, "P K S W"]:
        block, offset = slots[token] // S, slots[token] % S
        return pool.at[block, :, offset].set(kv[token])

    return jax.lax.fori_loop(0, kv.shape[0], write, pool)
