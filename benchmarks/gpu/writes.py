"""What changes the pool: new K and V of one layer, copies of blocks in all layers; microseconds.

The kernels beside what XLA makes of the same. K and V come from memory here; in a step XLA's
scatter computes them on the way, which its figure does not show. `repeated` is the scatter that
is not told that slots are distinct.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import random_arrays
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.gpu.timing import Chain, compile_all, time_chain
from pallas_kernels import Backend, copy_blocks, pool_shape, write_kv
from pallas_kernels.gpu.write import write_kv as write_by_kernel

BLOCK_SIZE = 16
NUM_TURNS = 8  # of new K and V, each for other slots
NUM_PADDING = 3  # tokens of a write that go to the null block
KV_SCALE = 2.0**-5  # division by it is exact, whichever instruction does it
WRITE_CALLS, COPY_CALLS = 8, 4
MOST_COPIES = 64
FILLED = 3  # a pool's values before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Which shapes are measured."""

    heads: list[tuple[int, int, int]]
    tokens: list[int]
    dtypes: list[str]
    counts: list[int]
    num_layers: int
    write_blocks: int
    copy_blocks: int


SCALES = {
    "full": Scale(
        heads=[(32, 8, 128), (9, 3, 64)],
        tokens=[64, 2048],
        dtypes=["bfloat16", "int8"],
        counts=[0, 1, 8],
        num_layers=30,
        write_blocks=4096,
        copy_blocks=256,
    ),
    "toy": Scale(
        heads=[(6, 3, 16)],
        tokens=[5],
        dtypes=["bfloat16", "int8"],
        counts=[0, 3],
        num_layers=2,
        write_blocks=6,
        copy_blocks=12,
    ),
}

Side = Callable[..., Any]


def run(settings: Settings, record: Record) -> None:
    """Records each side of each write and copy; its result must be the reference's, bit for bit."""
    scale = SCALES[settings.scale]
    for heads in scale.heads:
        for num_tokens in scale.tokens:
            for dtype in scale.dtypes:
                name = f"write {'/'.join(map(str, heads))} {num_tokens} {dtype}"
                if settings.wants(name) and settings.lacks(f"{name} kernel"):  # its last side
                    _time_writes(name, heads, num_tokens, dtype, settings, record)
        name = f"copy {'/'.join(map(str, heads))} {scale.num_layers} layers"
        if settings.wants(name):
            _time_copies(name, heads, settings, record)


def _time_writes(
    name: str,
    heads: tuple[int, int, int],
    num_tokens: int,
    dtype: str,
    settings: Settings,
    record: Record,
) -> None:
    _, K, H = heads
    scales = jnp.full((2, K), KV_SCALE) if dtype == "int8" else None
    pool = _pool(heads, SCALES[settings.scale].write_blocks, dtype)
    turns = _new_tokens(num_tokens, pool, settings.seed)
    expected = _after_write(pool, turns[0], kv_scales=scales, backend=Backend.REFERENCE)
    moved = num_tokens * K * 2 * H * (2 + jnp.dtype(dtype).itemsize)
    sides = {
        side: functools.partial(call, kv_scales=scales)
        for side, call in _write_sides(settings.backend).items()
    }
    compiled = _compile(sides, WRITE_CALLS, pool, turns)
    for side in sides:
        arrays = pool, turns[0], turns
        record.begin(f"{name} {side}")
        record(f"{name} {side}", _time(compiled, side, WRITE_CALLS, arrays, expected, moved))


def _write_sides(backend: str) -> dict[str, Side]:
    """Calls of (pool, (k, v, slots)); the kernel where the backend is a GPU's."""
    sides = {
        "scatter": functools.partial(_after_write, backend=Backend.XLA),
        "repeated": _repeated_scatter,
    }
    if backend.startswith("pallas-gpu"):
        interpret = backend.endswith("interpret")

        def write(pool: Any, new: Any, *, kv_scales: Any) -> jax.Array:
            return write_by_kernel(pool, *new, kv_scales=kv_scales, interpret=interpret)

        sides["kernel"] = write
    return sides


def _after_write(pool: Any, new: Any, *, kv_scales: Any, backend: Backend) -> jax.Array:
    return write_kv(pool, *new, kv_scales=kv_scales, backend=backend)


def _repeated_scatter(pool: Any, new: Any, *, kv_scales: Any) -> jax.Array:
    k, v, slots = new
    P, K, S, W = pool.shape
    kv = jnp.concatenate([k, v], axis=-1)
    if kv_scales is not None:  # as `quantize` does, of which rows alone can be had
        scales_KW = jnp.repeat(kv_scales.T, W // 2, axis=1)
        kv = jnp.round(jnp.clip(kv.astype(jnp.float32) / scales_KW[None], -127, 127))
    rows_TK = ((slots // S)[:, None] * K + jnp.arange(K)[None, :]) * S + (slots % S)[:, None]
    flat = pool.reshape(P * K * S, W).at[rows_TK].set(kv.astype(pool.dtype), mode="drop")
    return flat.reshape(pool.shape)


def _time_copies(
    name: str, heads: tuple[int, int, int], settings: Settings, record: Record
) -> None:
    scale = SCALES[settings.scale]
    pools = tuple(
        (layer + jnp.arange(scale.copy_blocks)[:, None, None, None] + pool).astype(pool.dtype)
        for layer in range(scale.num_layers)
        for pool in [_pool(heads, scale.copy_blocks, "bfloat16")]
    )
    sides = {
        side: functools.partial(_after_copies, backend=Backend(side))
        for side in dict.fromkeys([settings.backend, "xla"])
    }
    moves = [_copies(count, scale.copy_blocks, settings.seed) for count in scale.counts]
    compiled = _compile(sides, COPY_CALLS, pools, moves[:1])
    for count, move in zip(scale.counts, moves, strict=True):
        expected = _copied_by_numpy(pools, move)
        moved = 2 * count * sum(pool.nbytes for pool in pools) // scale.copy_blocks
        for side in sides:
            record.begin(f"{name} x {count} {side}")
            result = _time(compiled, side, COPY_CALLS, (pools, move, [move]), expected, moved)
            record(f"{name} x {count} {side}", result)


def _after_copies(pools: Any, move: Any, *, backend: Backend) -> tuple[jax.Array, ...]:
    return copy_blocks(pools, *move, backend=backend)


def _copied_by_numpy(pools: tuple[jax.Array, ...], move: Any) -> tuple[np.ndarray, ...]:
    copies, count = (np.asarray(array) for array in move)
    found = tuple(np.array(pool) for pool in pools)
    for pool in found:
        for source, destination in copies[:count]:
            pool[destination] = pool[source]
    return found


def _compile(sides: dict[str, Side], calls: int, x: Any, turns: list[Any]) -> dict[Any, Any]:
    """Each side's chain, and it alone."""
    programs = {}
    for name, side in sides.items():
        programs[name] = functools.partial(Chain(side, calls).lower, x, turns)
        once = jax.jit(side, donate_argnums=0)
        programs[name, "once"] = functools.partial(once.lower, x, turns[0])
    return compile_all(programs)


def _time(
    compiled: dict[Any, Any],
    side: str,
    calls: int,
    arrays: tuple[Any, Any, list[Any]],
    expected: Any,
    moved: int,
) -> dict:
    """Microseconds of a call, bytes a second, and whether it did what was expected."""
    chain, once = compiled[side], compiled[side, "once"]
    failure = next((one for one in (chain, once) if isinstance(one, Exception)), None)
    if failure is not None:
        return {"ok": False, "error": describe(failure)}
    x, turn, turns = arrays
    same = _same(once(jax.tree.map(jnp.copy, x), turn), expected)
    timing, _ = time_chain(chain, calls, jax.tree.map(jnp.copy, x), turns)
    result = {"ok": same, **timing} | ({} if same else {"error": "bits differ"})
    return result | ({"gbps": round(moved / timing["us"] / 1e3, 1)} if moved else {})


def _same(found: Any, expected: Any) -> bool:
    """Equal but for the null block, which may hold anything."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(bool(jnp.array_equal(a[1:], b[1:])) for a, b in pairs)


def _pool(heads: tuple[int, int, int], num_blocks: int, dtype: str) -> jax.Array:
    _, K, H = heads
    shape = pool_shape(num_blocks=num_blocks, num_kv_heads=K, block_size=BLOCK_SIZE, head_size=H)
    return jnp.full(shape, FILLED, dtype)


def _new_tokens(num_tokens: int, pool: jax.Array, seed: int) -> list[Any]:
    """K, V and slots, several times; the last few tokens are padding."""
    P, K, S, W = pool.shape
    kv = random_arrays(seed, (num_tokens, K, W // 2), 2 * NUM_TURNS, jnp.bfloat16)
    rng = np.random.default_rng(seed)
    turns = []
    for turn in range(NUM_TURNS):
        slots = (S + rng.permutation(P * S - S)[:num_tokens]).astype(np.int32)
        slots[-NUM_PADDING:] = 0
        turns.append((kv[2 * turn], kv[2 * turn + 1], jnp.asarray(slots)))
    return turns


def _copies(count: int, num_blocks: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """So many copies, each from a block that the one before wrote, and how many there are."""
    ids = np.random.default_rng(seed).permutation(num_blocks - 1)[: count + 1] + 1
    copies = np.zeros((MOST_COPIES, 2), np.int32)
    copies[:count] = np.stack([ids[:-1], ids[1:]], axis=1)
    return jnp.asarray(copies), jnp.int32(count)
