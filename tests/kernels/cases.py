"""Ragged batches over a pool whose unused slots are NaN, and what NumPy gives in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Backend, PagedBatch, paged_attention, paged_decode
from pallas_kernels.cpu import kernels
from pallas_kernels.cpu.build import BuildError

SCALE = 0.3


def _backends_here() -> list[Backend]:
    """Those that run on a CPU; `cpu` where there is a C++ compiler."""
    try:
        kernels.prepare()
    except BuildError:
        return [Backend.REFERENCE, Backend.XLA]
    return [Backend.REFERENCE, Backend.XLA, Backend.CPU]


BACKENDS = _backends_here()


@dataclasses.dataclass(frozen=True)
class Case:
    """Some rows' queries over a pool whose other slots are NaN, and each row's own K and V."""

    q: np.ndarray
    pool: np.ndarray
    batch: PagedBatch
    contexts: list[np.ndarray]  # of each row, [C, K, 2H]


def make_case(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int, int] = (6, 3, 16),
    block_size: int = 8,
    num_padding: int = 2,
    seed: int = 0,
) -> Case:
    """Rows of (queries, context); their blocks are shuffled, and the padding comes last.

    The queries and contexts of a seed are the same whatever the block size.
    """
    N, K, H = heads
    S, rng = block_size, np.random.default_rng(seed)
    rows = sorted(rows, key=lambda row: row[0] != 1)
    num_blocks = 3 + sum(-(-context // S) for _, context in rows)
    ids = iter(np.random.default_rng(seed).permutation(np.arange(1, num_blocks)))
    num_columns = 2 + max(-(-context // S) for _, context in rows)
    tables = np.zeros((len(rows) + num_padding, num_columns), np.int32)
    pool = np.full((num_blocks, K, S, 2 * H), np.nan, np.float32)
    contexts = []
    for row, (_, context) in enumerate(rows):
        kv = rng.standard_normal((context, K, 2 * H)).astype(np.float32)
        contexts.append(kv)
        for token in range(context):
            column, offset = divmod(token, S)
            if offset == 0:
                tables[row, column] = next(ids)
            pool[tables[row, column], :, offset] = kv[token]
    starts = np.cumsum([0, *(queries for queries, _ in rows), *[0] * num_padding])
    lens = [*(context for _, context in rows), *[0] * num_padding]
    q = rng.standard_normal((starts[-1] + 3, N, H)).astype(np.float32)  # three padding tokens
    num_decodes = sum(queries == 1 for queries, _ in rows)
    batch = PagedBatch(
        jnp.asarray(tables),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lens, jnp.int32),
        jnp.int32(num_decodes),
    )
    return Case(q, pool, batch, contexts)


def rounded(case: Case, dtype: str) -> Case:
    """The case with values that are exact in the dtype, so that the dtype costs no accuracy yet."""
    q, pool, *contexts = (
        x.astype(jnp.dtype(dtype)).astype(np.float32) for x in (case.q, case.pool, *case.contexts)
    )
    return Case(q, pool, case.batch, contexts)


def quantized(case: Case, dtype: str) -> tuple[Case, np.ndarray]:
    """The case over a pool of eight bits and its scales; contexts are what the pool says exactly.

    Other slots hold the worst there is: NaN, or 127 where there is none.
    """
    largest = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    K, H = case.pool.shape[1], case.q.shape[2]
    halves = np.concatenate(case.contexts).reshape(-1, K, 2, H)
    kv_scales = np.abs(halves).max(axis=(0, 3)).T / np.float32(largest)
    scales_KW = np.repeat(kv_scales.T, H, axis=1).astype(np.float64)

    def store(kv: np.ndarray, scales: np.ndarray) -> np.ndarray:
        scaled = kv / scales
        if dtype == "int8":
            scaled = np.nan_to_num(np.rint(scaled), nan=127)
        return scaled.astype(jnp.dtype(dtype))

    contexts = [store(kv, scales_KW).astype(np.float64) * scales_KW for kv in case.contexts]
    pool = store(case.pool, scales_KW[:, None, :])
    return dataclasses.replace(case, pool=pool, contexts=contexts), kv_scales


def padded(case: Case, *, tokens: int, columns: int, blocks: int) -> Case:
    """The case in arrays of these sizes, so that one program serves many cases."""
    missing = columns - case.batch.block_tables.shape[1]
    tables = jnp.pad(case.batch.block_tables, [(0, 0), (0, missing)])
    return dataclasses.replace(
        case,
        q=np.pad(case.q, [(0, tokens - len(case.q)), (0, 0), (0, 0)]),
        pool=np.pad(
            case.pool, [(0, blocks - len(case.pool)), *[(0, 0)] * 3], constant_values=np.nan
        ),
        batch=dataclasses.replace(case.batch, block_tables=tables),
    )


def only_needed(case: Case, window: int | None = None) -> Case:
    """The case with NaN in slots that no query sees, and with their blocks outside the pool."""
    tables, pool = np.array(case.batch.block_tables), case.pool.copy()
    S = pool.shape[2]
    needed = np.zeros(tables.shape, bool)
    queries = np.diff(np.asarray(case.batch.query_starts))
    for row, kv in enumerate(case.contexts):
        first = 0 if window is None else max(0, len(kv) - queries[row] - window + 1)
        for token in range(first):
            pool[tables[row, token // S], :, token % S] = np.nan
        needed[row, first // S : -(-len(kv) // S)] = True
    tables[~needed] = len(pool) + 5
    batch = dataclasses.replace(case.batch, block_tables=jnp.asarray(tables))
    return dataclasses.replace(case, pool=pool, batch=batch)


def dense(
    case: Case,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """The same in float64 over each row's context; zeros where a token has no row."""
    _, N, H = case.q.shape
    K = case.pool.shape[1]
    out = np.zeros(case.q.shape)
    starts = np.asarray(case.batch.query_starts)
    for row, kv in enumerate(case.contexts):
        C = len(kv)
        if not C:
            continue
        for token in range(starts[row], starts[row + 1]):
            position = C - starts[row + 1] + token
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(N):
                seen = kv[first : position + 1, head // (N // K)].astype(np.float64)
                logits = seen[:, :H] @ case.q[token, head].astype(np.float64) * SCALE
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                sink = -np.inf if sinks is None else np.float64(sinks[head])
                high = max(logits.max(), sink)
                weights = np.exp(logits - high)
                total = weights.sum() + np.exp(sink - high)
                out[token, head] = weights @ seen[:, H:] / total
    return out


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def attend(q: Any, pool: Any, batch: PagedBatch, **options: Any) -> jax.Array:
    return paged_attention(q, pool, batch, **options)


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def decode(q: Any, pool: Any, tables: Any, lens: Any, **options: Any) -> jax.Array:
    return paged_decode(q, pool, tables, lens, **options)


def run(case: Case, backend: Backend, **options: Any) -> np.ndarray:
    """The backend's attention; what stands in padding tokens is of no concern."""
    out = attend(case.q, case.pool, case.batch, scale=SCALE, backend=backend, **options)
    return np.asarray(out)[: case.batch.query_starts[-1]]


def one_token_a_row(case: Case) -> Case:
    """The same contexts with one query each, the padding rows as well: what decode is given."""
    B = len(case.batch.seq_lens)
    batch = dataclasses.replace(
        case.batch, query_starts=jnp.arange(B + 1, dtype=jnp.int32), num_decodes=jnp.int32(B)
    )
    return dataclasses.replace(case, q=case.q[:B], batch=batch)
