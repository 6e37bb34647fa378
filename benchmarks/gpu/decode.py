"""Decode attention of one layer: microseconds, live KV a second, beside what reads it otherwise.

Contexts are full, tables are random, pools take turns. `xla` is the same walk in plain jax.numpy;
`contiguous` is plain jax.numpy over keys and values that lie in order, with no table at all. What
is tested besides (`beside.py`) is one side more.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

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
from benchmarks.gpu.timing import MOST_TURNS, Chain, compile_all, num_turns, time_chain
from pallas_kernels import Backend, paged_decode

DTYPE = "bfloat16"
ERROR_BOUND = 1e-2
HEADS = [(32, 8, 128), (9, 3, 64), (14, 2, 64)]
BATCHES = [(64, 4096), (8, 4096), (1, 1024), (256, 2048)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """Rows of equal context."""

    heads: tuple[int, int, int]
    rows: int
    context: int
    block_size: int = 16
    dtype: str = DTYPE

    @property
    def name(self) -> str:
        """What it is called in the results."""
        return f"{'/'.join(map(str, self.heads))} {self.rows} x {self.context}"

    @property
    def kv_bytes(self) -> int:
        """Bytes that a call must read."""
        _, K, H = self.heads
        return self.rows * self.context * K * 2 * H * jnp.dtype(self.dtype).itemsize

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.heads[2] ** -0.5


SHAPES = {
    "full": [
        DecodeShape(heads=heads, rows=rows, context=context)
        for heads in HEADS
        for rows, context in BATCHES
    ],
    "toy": [DecodeShape(heads=(6, 3, 16), rows=3, context=40, block_size=8)],
}


class Layout(enum.Enum):
    """How keys and values lie; all but POOL are pairs of arrays, and have no null block."""

    POOL = "[P, K, S, 2H]"
    CONTIGUOUS = "[B, C, K, H]"
    BY_HEAD = "[B, K, C, H]"
    PAGES = "[P, S, K, H]"
    HEAD_PAGES = "[K, P, S, H]"


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to attend: `attend(q, kv, tables, lens)`. A peer may fail, ours may not."""

    attend: Callable[..., Any]
    layout: Layout = Layout.POOL
    most_calls: int = MOST_TURNS
    is_peer: bool = False


def run(settings: Settings, record: Record) -> None:
    """Records each side of each shape; everything is compiled before anything is timed."""
    shapes = shapes_for(settings)
    measure({shape: _sides(shape, settings) for shape in shapes}, settings, record)
    if (second := second_backend(settings, record)) is not None:
        name = second.value
        measure({shape: {name: Side(paged(shape, name))} for shape in shapes}, settings, record)


def shapes_for(settings: Settings) -> list[DecodeShape]:
    """Those that the settings ask for."""
    return [shape for shape in SHAPES[settings.scale] if settings.wants(shape.name)]


def _sides(shape: DecodeShape, settings: Settings) -> dict[str, Side]:
    return {
        settings.backend: Side(paged(shape, settings.backend)),
        "xla": Side(paged(shape, "xla"), most_calls=2),  # a call is a hundred kernels and more
        "contiguous": Side(
            functools.partial(contiguous_attention, scale=shape.scale), Layout.BY_HEAD
        ),
    }


def paged(shape: DecodeShape, backend: str) -> Callable[..., Any]:
    """Attention over the pool by the backend."""

    def attend(q: Any, pool: Any, tables: Any, lens: Any) -> jax.Array:
        return paged_decode(q, pool, tables, lens, scale=shape.scale, backend=Backend(backend))

    return attend


def contiguous_attention(
    q: Float[Array, "B N H"],
    kv: tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]],
    tables: Int32[Array, "B M"],  # noqa: ARG001 - the paged side's, for equal calls
    lens: Int32[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """Plain jax.numpy over contexts that lie in order, as its products want them."""
    k, v = kv
    B, K, C, _ = k.shape
    q_BKGH = q.reshape(B, K, -1, q.shape[2])
    logits = jnp.einsum("BKGH,BKCH->BKGC", q_BKGH, k, preferred_element_type=jnp.float32) * scale
    visible_BC = jnp.arange(C)[None, :] < lens[:, None]
    weights = jax.nn.softmax(jnp.where(visible_BC[:, None, None, :], logits, -1e30))
    out = jnp.einsum(
        "BKGC,BKCH->BKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)


def measure(shapes: dict[DecodeShape, dict[str, Side]], settings: Settings, record: Record) -> None:
    """Times every side of every shape that is not known, and checks what it computes."""
    shapes = {
        shape: {
            name: side for name, side in sides.items() if settings.lacks(f"{shape.name} {name}")
        }
        for shape, sides in shapes.items()
    }
    programs = {}
    for shape, sides in shapes.items():
        for name, side in sides.items():
            programs[shape, name] = functools.partial(_lower_chain, shape, side)
            programs[shape, name, "once"] = functools.partial(_lower_once, shape, side)
    compiled = compile_all(programs)
    for shape, sides in shapes.items():
        if not sides:
            continue
        arrays = _arrays(shape, settings.seed)
        for layout in Layout:
            mine = {name: side for name, side in sides.items() if side.layout is layout}
            turns = _turns(_kv_specs(shape, layout), settings.seed) if mine else []
            for name, side in mine.items():
                record.begin(f"{shape.name} {name}")
                found = compiled[shape, name], compiled[shape, name, "once"]
                result = _time(shape, side, *found, turns, arrays, settings)
                record(f"{shape.name} {name}", result)
            del turns


def bandwidth(shape: DecodeShape, us: float, settings: Settings) -> dict[str, float]:
    """Live keys and values a second, and their share of what can be read."""
    gbps = shape.kv_bytes / us / 1e3
    found = {"gbps": round(gbps, 1)}
    if settings.read_gbps is not None:
        found["of_ceiling"] = round(gbps / settings.read_gbps, 3)
    return found


def _time(
    shape: DecodeShape,
    side: Side,
    chain: Any,
    once: Any,
    turns: list,
    arrays: dict[str, Any],
    settings: Settings,
) -> dict:
    failure = next((one for one in (chain, once) if isinstance(one, Exception)), None)
    if failure is not None:
        return {"ok": side.is_peer, "error": describe(failure)}
    try:
        q = jnp.copy(arrays["q"])
        timing, _ = time_chain(chain, _calls(shape, side), q, turns, *arrays["rest"])
        error = _error(shape, side.layout, once, arrays, turns[0])
    except Exception as reason:  # noqa: BLE001 - whatever it is, the other sides still count
        return {"ok": side.is_peer, "error": describe(reason)}
    result = {"ok": True, **timing, **bandwidth(shape, timing["us"], settings), "error_norm": error}
    if not error <= ERROR_BOUND:
        result |= {"ok": side.is_peer, "error": "it computes something else"}
    return result


def _lower_chain(shape: DecodeShape, side: Side) -> jax.stages.Lowered:
    chain = Chain(side.attend, _calls(shape, side))
    q, *rest = _specs(shape)
    return chain.lower(q, _kv_specs(shape, side.layout), *rest)


def _lower_once(shape: DecodeShape, side: Side) -> jax.stages.Lowered:
    q, *rest = _specs(shape)
    return jax.jit(side.attend).lower(q, _kv_specs(shape, side.layout)[0], *rest)


def _calls(shape: DecodeShape, side: Side) -> int:
    """Enough for every pool to have its turn, and to outweigh the launch."""
    return min(side.most_calls, max(16, num_turns(shape.kv_bytes)))


def _specs(shape: DecodeShape) -> list[jax.ShapeDtypeStruct]:
    """Of the query, the tables and the lengths."""
    N, _, H = shape.heads
    B, spec = shape.rows, jax.ShapeDtypeStruct
    columns = -(-shape.context // shape.block_size)
    return [
        spec((B, N, H), jnp.dtype(shape.dtype)),
        spec((B, columns), jnp.int32),
        spec((B,), jnp.int32),
    ]


def _kv_specs(shape: DecodeShape, layout: Layout) -> list:
    """Of all keys and values that take turns."""
    _, K, H = shape.heads
    B, C, S = shape.rows, shape.context, shape.block_size
    turns = num_turns(shape.kv_bytes)
    blocks = B * -(-C // S)
    sizes = {
        Layout.POOL: paged_shape(shape.heads, B, C, S),
        Layout.CONTIGUOUS: (B, C, K, H),
        Layout.BY_HEAD: (B, K, C, H),
        Layout.PAGES: (blocks, S, K, H),
        Layout.HEAD_PAGES: (K, blocks, S, H),
    }
    spec = jax.ShapeDtypeStruct(sizes[layout], jnp.dtype(shape.dtype))
    return [spec if layout is Layout.POOL else (spec, spec)] * turns


def _arrays(shape: DecodeShape, seed: int) -> dict[str, Any]:
    tables = shuffled_tables(seed, shape.rows, shape.context, shape.block_size)
    lens = jnp.full(shape.rows, shape.context, jnp.int32)
    N, _, H = shape.heads
    q = random_array(random_key(seed + 99), (shape.rows, N, H), jnp.dtype(shape.dtype))
    return {"q": q, "rest": (jnp.asarray(tables), lens)}


def _turns(specs: list, seed: int) -> list:
    leaves, tree = jax.tree.flatten(specs)
    arrays = random_arrays(seed, leaves[0].shape, len(leaves), leaves[0].dtype)
    return jax.block_until_ready(jax.tree.unflatten(tree, arrays))


def _error(shape: DecodeShape, layout: Layout, once: Any, arrays: dict[str, Any], kv: Any) -> float:
    """One call's error on three of the rows."""
    q, (tables, lens) = arrays["q"], arrays["rest"]
    out = once(q, kv, tables, lens)
    error = 0.0
    for row in sorted({0, shape.rows // 2, shape.rows - 1}):
        mine = _row(layout, kv, tables, row)
        expected = attention_of_row(q[row : row + 1], mine, lens[row], scale=shape.scale)
        error = max(error, relative_error(np.asarray(out[row : row + 1]), np.asarray(expected)))
    return error


def _row(layout: Layout, kv: Any, tables: Int32[Array, "B M"], row: int) -> Float[Array, "K C W"]:
    """One row's keys and values in order."""
    if layout is Layout.POOL:
        return row_of_pool(kv, tables[row])
    if layout in (Layout.CONTIGUOUS, Layout.BY_HEAD):
        both = jnp.concatenate([part[row] for part in kv], axis=-1)
        return both if layout is Layout.BY_HEAD else jnp.moveaxis(both, 0, 1)
    ids = tables[row] - 1  # there is no null block
    parts = [part[:, ids] if layout is Layout.HEAD_PAGES else part[ids] for part in kv]
    pages = jnp.concatenate(parts, axis=-1)
    if layout is Layout.PAGES:
        pages = jnp.moveaxis(pages, 2, 0)
    return pages.reshape(pages.shape[0], -1, pages.shape[-1])
