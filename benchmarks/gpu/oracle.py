"""Ragged batches over a poisoned pool, and attention over them on the host in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

NO_BLOCK = 2**30  # behind a context's last block, where a table may hold anything
SCALE = 0.3  # over head sizes of 64 to 256 this makes peaks: errors in the logits show


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of queries and contexts, in a pool whose other slots are NaN, null block included.

    A pool of eight bits has what is worst there: NaN in float8, 127 in int8.
    """

    q: np.ndarray  # [T, N, H], three padding tokens at the end
    pool: np.ndarray  # [P, K, S, 2H]
    block_tables: np.ndarray  # i32[B, M]
    query_starts: np.ndarray  # i32[B+1]
    seq_lens: np.ndarray  # i32[B]
    num_decodes: int
    contexts: tuple[np.ndarray, ...]  # of each row, [C, K, 2H], as the pool and its scales say it
    kv_scales: np.ndarray | None = None  # [2, K], of a pool of eight bits

    @property
    def num_tokens(self) -> int:
        """Queries that a row owns; what comes behind is padding."""
        return int(self.query_starts[-1])


def make_ragged(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int, int],
    block_size: int,
    dtype: str,
    seed: int,
    pool_dtype: str | None = None,
    num_padding: int = 2,
) -> Ragged:
    """Rows of (queries, context), one-token rows first; values are exact in the dtype.

    `pool_dtype` is the dtype's own, or one of eight bits. Tables name no block behind a context.
    """
    N, K, H = heads
    S, rng = block_size, np.random.default_rng(seed)
    exact, stored = jnp.dtype(dtype), jnp.dtype(pool_dtype or dtype)
    kv_scales = None if stored == exact else _random_scales(rng, K, stored)
    rows = sorted(rows, key=lambda row: row[0] != 1)
    columns = [-(-context // S) for _, context in rows]
    num_blocks = 4 + sum(columns)
    ids = rng.permutation(np.arange(1, num_blocks))
    tables = np.full((len(rows) + num_padding, 2 + max(columns)), NO_BLOCK, np.int32)
    pool = np.full((num_blocks, K, S, 2 * H), 127 if stored == np.int8 else np.nan, stored)
    contexts, given = [], 0
    for row, ((_, context), count) in enumerate(zip(rows, columns, strict=True)):
        values = rng.standard_normal((context, K, 2 * H), np.float32)
        kv = values.astype(exact) if kv_scales is None else _quantized(values, kv_scales, stored)
        mine = ids[given : given + count]
        given += count
        tables[row, :count] = mine
        tokens = np.arange(context)
        pool[mine[tokens // S], :, tokens % S] = kv
        contexts.append(kv if kv_scales is None else _widened(kv, kv_scales))
    starts = np.cumsum([0, *(queries for queries, _ in rows), *[0] * num_padding])
    q = rng.standard_normal((starts[-1] + 3, N, H), np.float32).astype(exact)
    lens = [*(context for _, context in rows), *[0] * num_padding]
    return Ragged(
        q,
        pool,
        tables,
        starts.astype(np.int32),
        np.array(lens, np.int32),
        sum(queries == 1 for queries, _ in rows),
        tuple(contexts),
        kv_scales,
    )


def _random_scales(rng: np.random.Generator, K: int, dtype: jnp.dtype) -> np.ndarray:
    """Another one for each head and half, such that few normal values are cut."""
    largest = 127 if dtype == np.int8 else float(jnp.finfo(dtype).max)
    return (rng.uniform(3, 6, (2, K)) / largest).astype(np.float32)


def _quantized(values: np.ndarray, kv_scales: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    scaled = values / _by_lane(kv_scales, values.shape[-1])
    if dtype == np.int8:
        return np.rint(np.clip(scaled, -127, 127)).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return np.clip(scaled, -largest, largest).astype(dtype)


def _widened(kv: np.ndarray, kv_scales: np.ndarray) -> np.ndarray:
    return kv.astype(np.float64) * _by_lane(kv_scales, kv.shape[-1])


def _by_lane(kv_scales: np.ndarray, width: int) -> np.ndarray:
    """Scales as rows of the pool have them, `[K, 2H]`."""
    return np.repeat(kv_scales.T, width // 2, axis=1)


def dense(
    ragged: Ragged,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """What attention gives for every token that a row owns, `[T, N, H]` in float64."""
    N, H = ragged.q.shape[1:]
    K = ragged.pool.shape[1]
    out = np.zeros((ragged.query_starts[-1], N, H))
    for row, kv in enumerate(ragged.contexts):
        tokens = slice(*ragged.query_starts[row : row + 2])
        q = ragged.q[tokens].astype(np.float64)
        T, C = len(q), len(kv)
        positions_T = C - T + np.arange(T)
        keys, values = np.split(kv.astype(np.float64), 2, axis=-1)
        q_KQH = np.moveaxis(q.reshape(T, K, N // K, H), 1, 0).reshape(K, -1, H)
        logits = (q_KQH @ keys.transpose(1, 2, 0)).reshape(K, T, N // K, C) * SCALE
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        visible_TC = np.arange(C)[None, :] <= positions_T[:, None]
        if window is not None:
            visible_TC &= np.arange(C)[None, :] > positions_T[:, None] - window
        logits = np.where(visible_TC[None, :, None, :], logits, -np.inf)
        high, silent = logits.max(axis=-1, keepdims=True), 0.0
        if sinks is not None:
            sinks_K1G1 = sinks.astype(np.float64).reshape(K, 1, N // K, 1)
            high = np.maximum(high, sinks_K1G1)
            silent = np.exp(sinks_K1G1 - high)
        weights = np.exp(logits - high)
        weights /= weights.sum(axis=-1, keepdims=True) + silent
        found = weights.reshape(K, -1, C) @ values.transpose(1, 0, 2)
        out[tokens] = np.moveaxis(found.reshape(K, T, N // K, H), 0, 1).reshape(T, N, H)
    return out
