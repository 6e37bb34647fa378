"""Prefill attention of one layer: microseconds and TFLOP/s, beside cuDNN's over K and V in order.

Only products that the causal mask leaves are counted. cuDNN as JAX calls it cannot align the mask
of a chunk with the end of its context, so it runs without a mask and its own products are counted.
What is tested besides (`beside.py`) is one side more.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.beside import second_backend
from benchmarks.gpu.inputs import (
    attention_of_row,
    paged_shape,
    random_array,
    random_arrays,
    random_key,
    relative_error,
    row_of_pool,
    shuffled_tables,
)
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.gpu.timing import Chain, compile_all, time_chain
from pallas_kernels import Backend, PagedBatch, paged_attention

Attend = Callable[..., jax.Array]

DTYPE = "bfloat16"
ERROR_BOUND = 1e-2
TURNS = 4
CUDNN = "cudnn"
CALLS = {"xla": 1}
DEFAULT_CALLS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """Rows of equal chunks at the end of equal contexts."""

    heads: tuple[int, int, int]
    rows: int
    queries: int
    context: int
    block_size: int = 16
    dtype: str = DTYPE

    @property
    def name(self) -> str:
        """What it is called in the results."""
        heads = "/".join(map(str, self.heads))
        return f"{heads} {self.rows} x {self.queries} of {self.context}"

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.heads[2] ** -0.5

    @property
    def causal_flops(self) -> float:
        """Of both products, over what each query sees."""
        seen = self.context - (self.queries - 1) / 2
        return self.dense_flops * seen / self.context

    @property
    def dense_flops(self) -> float:
        """Of both products without a mask."""
        N, _, H = self.heads
        return 4.0 * N * H * self.rows * self.queries * self.context


BATCHES = [(1, 2048, 8192), (4, 512, 2048), (1, 2048, 2048)]  # rows, queries, context
SHAPES = {
    "full": [
        PrefillShape(heads=heads, rows=rows, queries=queries, context=context)
        for heads in [(32, 8, 128), (9, 3, 64)]
        for rows, queries, context in BATCHES
    ],
    "toy": [PrefillShape(heads=(6, 3, 16), rows=2, queries=12, context=40, block_size=8)],
}


def run(settings: Settings, record: Record) -> None:
    """Records each side of each shape."""
    backends = dict.fromkeys((settings.backend, "xla"))
    shapes = {
        shape: {name: paged(shape, name) for name in backends}
        | {CUDNN: functools.partial(cudnn, shape=shape)}
        for shape in shapes_for(settings)
    }
    measure(shapes, settings, record)
    if (second := second_backend(settings, record)) is not None:
        name = second.value
        measure({shape: {name: paged(shape, name)} for shape in shapes}, settings, record)


def shapes_for(settings: Settings) -> list[PrefillShape]:
    """Those that the settings ask for."""
    return [shape for shape in SHAPES[settings.scale] if settings.wants(shape.name)]


def measure(
    shapes: dict[PrefillShape, dict[str, Attend]], settings: Settings, record: Record
) -> None:
    """Times every side that is not known; everything is compiled before anything is timed."""
    shapes = {
        shape: {
            name: attend for name, attend in sides.items() if settings.lacks(f"{shape.name} {name}")
        }
        for shape, sides in shapes.items()
    }
    programs = {}
    for shape, sides in shapes.items():
        for name, attend in sides.items():
            programs[shape, name] = functools.partial(_lower_chain, shape, name, attend)
            if name != CUDNN:
                programs[shape, name, "once"] = functools.partial(_lower_once, shape, attend)
    compiled = compile_all(programs)
    for shape, sides in shapes.items():
        for name in sides:
            record.begin(f"{shape.name} {name}")
            found = compiled[shape, name], compiled.get((shape, name, "once"))
            failure = next((one for one in found if isinstance(one, Exception)), None)
            result: dict = {}
            if failure is None:
                try:
                    result = _time(shape, name, *found, settings.seed)
                except Exception as reason:  # noqa: BLE001 - the other sides still count
                    failure = reason
            if failure is not None:  # a peer that cannot run is no failure of ours
                result = {"ok": name == CUDNN, "error": describe(failure)}
            record(f"{shape.name} {name}", result)


def paged(shape: PrefillShape, backend: str) -> Attend:
    """Attention over the pool by the backend."""

    def attend(q: Any, pool: Any, batch: PagedBatch) -> jax.Array:
        return paged_attention(q, pool, batch, scale=shape.scale, backend=Backend(backend))

    return attend


def cudnn(q: Any, kv: Any, batch: PagedBatch, *, shape: PrefillShape) -> jax.Array:  # noqa: ARG001
    """The forward attention of cuDNN, every query over the whole context."""
    N, _, H = shape.heads
    q_BTNH = q.reshape(shape.rows, shape.queries, N, H)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q_BTNH, *kv, scale=shape.scale).reshape(q.shape)


def _lower_chain(shape: PrefillShape, name: str, attend: Any) -> jax.stages.Lowered:
    specs = _specs(shape)
    chain = Chain(attend, CALLS.get(name, DEFAULT_CALLS))
    return chain.lower(specs["q"], specs[_turns_of(name)], specs["batch"])


def _lower_once(shape: PrefillShape, attend: Any) -> jax.stages.Lowered:
    specs = _specs(shape)
    return jax.jit(attend).lower(specs["q"], specs["pools"][0], specs["batch"])


def _turns_of(name: str) -> str:
    return "caches" if name == CUDNN else "pools"


def _time(shape: PrefillShape, name: str, chain: Any, once: Any, seed: int) -> dict:
    q, batch = _arrays(shape, seed)
    leaves, tree = jax.tree.flatten(_specs(shape)[_turns_of(name)])
    turns = jax.tree.unflatten(
        tree, random_arrays(seed, leaves[0].shape, len(leaves), leaves[0].dtype)
    )
    timing, _ = time_chain(chain, CALLS.get(name, DEFAULT_CALLS), jnp.copy(q), turns, batch)
    flops = shape.dense_flops if name == CUDNN else shape.causal_flops
    result = {"ok": True, **timing, "tflops": round(flops / timing["us"] / 1e6, 1)}
    return result | ({} if once is None else _error(shape, once, q, turns[0], batch))


def _specs(shape: PrefillShape) -> dict[str, Any]:
    N, K, H = shape.heads
    spec, dtype = jax.ShapeDtypeStruct, jnp.dtype(shape.dtype)
    pool = spec(paged_shape(shape.heads, shape.rows, shape.context, shape.block_size), dtype)
    cache = spec((shape.rows, shape.context, K, H), dtype)
    batch = jax.eval_shape(lambda: _batch(shape, seed=0))
    return {
        "q": spec((shape.rows * shape.queries, N, H), dtype),
        "pools": [pool] * TURNS,
        "caches": [(cache, cache)] * TURNS,
        "batch": batch,
    }


def _batch(shape: PrefillShape, *, seed: int) -> PagedBatch:
    tables = shuffled_tables(seed, shape.rows, shape.context, shape.block_size)
    starts = np.arange(shape.rows + 1) * shape.queries
    return PagedBatch(
        jnp.asarray(tables),
        jnp.asarray(starts, jnp.int32),
        jnp.full(shape.rows, shape.context, jnp.int32),
        jnp.int32(0),
    )


def _arrays(shape: PrefillShape, seed: int) -> tuple[jax.Array, PagedBatch]:
    N, _, H = shape.heads
    size = (shape.rows * shape.queries, N, H)
    q = random_array(random_key(seed + 99), size, jnp.dtype(shape.dtype))
    return q, _batch(shape, seed=seed)


def _error(
    shape: PrefillShape, once: Any, q: jax.Array, pool: jax.Array, batch: PagedBatch
) -> dict:
    """One call's error on a few queries at either end of the last row."""
    out = once(q, pool, batch)
    first, few = (shape.rows - 1) * shape.queries, min(8, shape.queries)
    error = 0.0
    for start in (0, shape.queries - few):
        tokens = slice(first + start, first + start + few)
        length = jnp.int32(shape.context - shape.queries + start + few)
        kv = row_of_pool(pool, batch.block_tables[-1])
        expected = attention_of_row(q[tokens], kv, length, scale=shape.scale)
        error = max(error, relative_error(np.asarray(out[tokens]), np.asarray(expected)))
    return {"error_norm": error, "ok": error <= ERROR_BOUND}
