"""Attention of one shape by every backend that this machine has, and over contexts in order.

All sides see the same keys and values. A run is one program of several calls, each with a pool of
its own and on the result of the call before it, so that nothing overlaps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Real

from benchmarks.attention_shapes import AttentionShape
from benchmarks.gpu.inputs import (
    paged_shape,
    random_array,
    random_arrays,
    random_key,
    relative_error,
    shuffled_tables,
)
from pallas_kernels import (
    Backend,
    PagedBatch,
    check_pool_of,
    choose_backend,
    paged_attention,
    paged_decode,
    pool_format,
)

CONTIGUOUS = "contiguous"
EIGHT_BIT_SCALE = 2.0**-5  # of K and V in eight bits: normal values fill them, and it is exact
LARGEST_ERROR = 2e-2  # relative, of bfloat16's rounding; more is another computation
QUERY_SEED = 99  # no pool's

Run = Callable[[], Float[Array, "T N H"]]


class Sides(NamedTuple):
    """What can be timed, and why the rest cannot."""

    runs: dict[str, Run]
    errors: dict[str, float]  # of one call, relative to the contiguous side's
    refused: dict[str, str]  # backends of another machine, or that take no such pool


class _Inputs(NamedTuple):
    """A query, a pool for each call, and whose blocks they hold."""

    q: Float[Array, "T N H"]
    pools: list[Real[Array, "P K S W"]]
    batch: PagedBatch
    kv_scales: Float[Array, "2 K"] | None


def sides_of(shape: AttentionShape, *, num_calls: int, seed: int) -> Sides:
    """Runs of `num_calls` calls, compiled and warm; they wait for their results."""
    inputs = _inputs(shape, num_calls, seed)
    attends, refused = _backends(shape, inputs)
    in_order = jax.jit(functools.partial(_in_order, shape))
    ordered = [in_order(pool, inputs.batch.block_tables) for pool in inputs.pools]
    contiguous = jax.jit(
        functools.partial(contiguous_attention, queries=shape.queries, scale=shape.scale)
    )
    expected = np.asarray(contiguous(inputs.q, ordered[0]), np.float32)
    runs: dict[str, Run] = {}
    errors = {}
    for name, attend in attends.items():
        pools = inputs.pools
        if (layout := pool_format(Backend(name))) is not None:
            pools = jax.device_put(pools, layout)
        chain = jax.jit(functools.partial(_chain, attend), in_shardings=(None, layout, None))
        runs[name] = functools.partial(_wait, chain, inputs.q, pools, inputs.batch)
        found = chain(inputs.q, pools[:1], inputs.batch)
        errors[name] = relative_error(np.asarray(found, np.float32), expected)
        assert errors[name] <= LARGEST_ERROR, f"{name} computes something else at {shape}"
    chain = jax.jit(lambda q, turns: _chain(lambda x, kv, _: contiguous(x, kv), q, turns, None))
    runs[CONTIGUOUS] = functools.partial(_wait, chain, inputs.q, ordered)
    for run in runs.values():
        run()
    return Sides(runs, errors, refused)


def contiguous_attention(
    q: Float[Array, "T N H"],
    kv: tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]],
    *,
    queries: int,
    scale: float,
) -> Float[Array, "T N H"]:
    """Plain jax.numpy over contexts that lie in order; each row has `queries` tokens, its last."""
    k, v = kv
    B, K, C, H = k.shape
    Q = queries
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # All queries of a KV head are one axis, A: with more axes XLA's CPU refuses bfloat16.
    q_BKAH = jnp.moveaxis(q.reshape(B, Q, K, -1, H), 1, 2).reshape(B, K, -1, H)
    logits_BKAC = product("BKAH,BKCH->BKAC", q_BKAH, k) * scale
    visible_QC = jnp.arange(C)[None, :] <= (C - Q + jnp.arange(Q))[:, None]
    visible_AC = jnp.repeat(visible_QC, q_BKAH.shape[2] // Q, axis=0)
    weights_BKAC = jax.nn.softmax(jnp.where(visible_AC[None, None], logits_BKAC, -1e30))
    out_BKAH = product("BKAC,BKCH->BKAH", weights_BKAC.astype(v.dtype), v)
    out_BQKGH = jnp.moveaxis(out_BKAH.reshape(B, K, Q, -1, H), 1, 2)
    return out_BQKGH.reshape(q.shape).astype(q.dtype)


def query_dtype(dtype: str) -> str:
    """That of the pool, or where it has eight bits what this platform multiplies fast."""
    if jnp.dtype(dtype).itemsize > 1:
        return dtype
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def _inputs(shape: AttentionShape, num_calls: int, seed: int) -> _Inputs:
    (N, K, H), dtype = shape.heads, jnp.dtype(shape.dtype)
    num_tokens = shape.rows * shape.queries
    q = random_array(
        random_key(seed + QUERY_SEED), (num_tokens, N, H), jnp.dtype(query_dtype(shape.dtype))
    )
    size = paged_shape(shape.heads, shape.rows, shape.context, shape.block_size)
    if dtype.itemsize > 1:
        pools, kv_scales = random_arrays(seed, size, num_calls, dtype), None
    else:
        wide = random_arrays(seed, size, num_calls, jnp.dtype("float32"))
        pools = [(jnp.clip(x, -3.9, 3.9) / EIGHT_BIT_SCALE).astype(dtype) for x in wide]
        kv_scales = jnp.full((2, K), EIGHT_BIT_SCALE, jnp.float32)
    tables = shuffled_tables(seed, shape.rows, shape.context, shape.block_size)
    batch = PagedBatch(
        jnp.asarray(tables),
        jnp.arange(shape.rows + 1, dtype=jnp.int32) * shape.queries,
        jnp.full(shape.rows, shape.context, jnp.int32),
        jnp.int32(shape.rows if shape.is_decode else 0),
    )
    return _Inputs(q, pools, batch, kv_scales)


def _backends(
    shape: AttentionShape, inputs: _Inputs
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Attention by each backend that runs here and takes this pool, and why the others do not.

    The reference and what simulates another device are for tests.
    """
    attends, refused = {}, {}
    N, K, H = shape.heads
    for backend in Backend:
        if backend is Backend.REFERENCE or backend.is_interpreted:
            continue
        attend = functools.partial(_attend, shape, backend, inputs.kv_scales)
        try:
            choose_backend(backend.value, jax.devices()[0].platform)
            check_pool_of(
                backend,
                block_size=shape.block_size,
                dtype=shape.dtype,
                head_size=H,
                queries_per_head=N // K,
            )
            jax.eval_shape(attend, inputs.q, inputs.pools[0], inputs.batch)
        except ValueError as reason:
            refused[backend.value] = str(reason)
        else:
            attends[backend.value] = attend
    return attends, refused


def _attend(
    shape: AttentionShape,
    backend: Backend,
    kv_scales: Float[Array, "2 K"] | None,
    q: Float[Array, "T N H"],
    pool: Real[Array, "P K S W"],
    batch: PagedBatch,
) -> Float[Array, "T N H"]:
    """The job that the engine would give to the backend."""
    if not shape.is_decode:
        return paged_attention(
            q, pool, batch, scale=shape.scale, kv_scales=kv_scales, backend=backend
        )
    tables, lens = batch.block_tables, batch.seq_lens
    return paged_decode(
        q, pool, tables, lens, scale=shape.scale, kv_scales=kv_scales, backend=backend
    )


def _in_order(
    shape: AttentionShape, pool: Real[Array, "P K S W"], tables: Int32[Array, "B M"]
) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]:
    """What the rows' blocks hold, in the queries' dtype."""
    _, K, _, W = pool.shape
    kv_BKCW = jnp.moveaxis(pool[tables], 1, 2).reshape(shape.rows, K, -1, W)
    kv_BKCW = kv_BKCW[:, :, : shape.context].astype(query_dtype(shape.dtype))
    if pool.dtype.itemsize == 1:
        kv_BKCW *= EIGHT_BIT_SCALE
    k_BKCH, v_BKCH = jnp.split(kv_BKCW, 2, axis=-1)
    return k_BKCH, v_BKCH


def _chain(
    attend: Callable[..., Any], q: Float[Array, "T N H"], turns: list, batch: PagedBatch | None
) -> Float[Array, "T N H"]:
    for turn in turns:
        q = attend(q, turn, batch)
    return q


def _wait(chain: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    return chain(*arguments).block_until_ready()
