"""What changes the pool, on the device against NumPy, bit for bit: new K and V, block copies."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.beside import refusal
from benchmarks.gpu.large import blocks_of, fill, lack_of_memory
from benchmarks.gpu.settings import Record, Settings, describe
from pallas_kernels import Backend, copy_blocks, write_kv

DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")
NUM_COPIES, COUNT = 7, 5  # of a list, and those that are to be done
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # magnitudes; pools of these have scales


def check(backend: Backend, settings: Settings, record: Record) -> None:
    """Records a write and copies for each dtype, and in pools whose offsets need all bits."""
    checks: dict[str, Callable[[Backend, int], dict]] = {}
    for dtype in DTYPES:
        if refusal(backend, block_size=16, dtype=dtype, head_size=64) is None:
            checks[f"write_kv {dtype}"] = functools.partial(_check_write, dtype)
            checks[f"copy_blocks {dtype}"] = functools.partial(_check_copies, dtype)
    for dtype in ("bfloat16", "int8"):
        checks[f"both at the end of a large pool {dtype}"] = functools.partial(
            _check_large, dtype, settings.scale
        )
    for name, one in checks.items():
        if not settings.lacks(name):
            continue
        record.begin(name)
        try:
            result = one(backend, settings.seed)
        except Exception as reason:  # noqa: BLE001 - whatever it is, the other cases still count
            result = {"ok": False, "error": describe(reason)}
        record(name, result)


def _check_write(dtype: str, backend: Backend, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    P, K, S, H, T = 37, 3, 16, 64, 200
    pool = _random(rng, (P, K, S, 2 * H), dtype)
    if dtype != "int8":
        pool[5] = np.nan
    slots = rng.permutation(np.arange(S, P * S))[:T].astype(np.int32)
    slots[-3:] = 0  # padding tokens all write to the null block
    k, v, scales = _new_tokens(rng, (T, K, H), dtype)
    expected = pool.copy()
    expected[slots // S, :, slots % S] = _stored(k, v, scales, dtype)
    return _exact(_write(backend)(jnp.array(pool), k, v, slots, scales), expected)


def _check_copies(dtype: str, backend: Backend, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    pools = _random(rng, (2, 29, 3, 8, 32), dtype)
    copies = rng.permutation(np.arange(1, 29))[: 2 * NUM_COPIES].reshape(-1, 2).astype(np.int32)
    copies[1, 0] = copies[0, 1]  # the source of one is what the one before it wrote
    expected = pools.copy()
    for source, destination in copies[:COUNT]:
        expected[:, destination] = expected[:, source]
    found = _copy(backend)(tuple(map(jnp.array, pools)), copies, np.int32(COUNT))
    return _exact(jnp.stack(found), expected)


def _check_large(dtype: str, scale: str, backend: Backend, seed: int) -> dict:
    """A write into the last blocks, and copies from there to the first and back."""
    rng = np.random.default_rng(seed)
    K, S, H, X = 2, 16, 64, 5  # X blocks at either end are looked at
    P = blocks_of((X, K, S, 2 * H), dtype, scale)
    reason = lack_of_memory(P * K * S * 2 * H * jnp.dtype(dtype).itemsize)
    if reason is not None:
        return {"ok": True, "error": reason}
    end = _random(rng, (X, K, S, 2 * H), dtype)
    pool = fill((P, K, S, 2 * H), jnp.dtype(dtype), end)
    begin = np.array(pool[:X])
    slots = (P * S - 1 - rng.permutation(X * S)[: 2 * S]).astype(np.int32)
    k, v, scales = _new_tokens(rng, (len(slots), K, H), dtype)
    pool = _write(backend)(pool, k, v, slots, scales)
    end[slots // S - (P - X), :, slots % S] = _stored(k, v, scales, dtype)
    copies = np.array([[P - 1, 2], [2, P - 3], [P - 2, 3]], np.int32)
    (pool,) = _copy(backend)((pool,), copies, np.int32(len(copies)))
    begin[2], end[X - 3], begin[3] = end[X - 1], end[X - 1], end[X - 2]
    found = jnp.concatenate([pool[:X], pool[-X:]])
    return _exact(found, np.concatenate([begin, end]))


def _write(backend: Backend) -> Callable[..., jax.Array]:
    def write(pool: Any, k: Any, v: Any, slots: Any, scales: Any) -> jax.Array:
        return write_kv(pool, k, v, slots, kv_scales=scales, backend=backend)

    return jax.jit(write, donate_argnums=0)


def _copy(backend: Backend) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(copy_blocks, backend=backend), donate_argnums=0)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (20 * rng.standard_normal(shape)).astype(jnp.dtype(dtype))


def _new_tokens(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """K, V, and scales where the pool has some: powers of two, by which division is exact."""
    is_scaled = dtype in LARGEST
    source = jnp.dtype("bfloat16" if is_scaled else dtype)
    k, v = (rng.standard_normal(shape).astype(source) for _ in range(2))
    exponents = -rng.integers(4, 8, (2, shape[1]))  # the largest values are cut
    return k, v, np.exp2(exponents).astype(np.float32) if is_scaled else None


def _stored(k: np.ndarray, v: np.ndarray, scales: np.ndarray | None, dtype: str) -> np.ndarray:
    """The rows of the pool."""
    kv = np.concatenate([k, v], axis=-1)
    if scales is None:
        return kv.astype(jnp.dtype(dtype))
    H, most = k.shape[-1], LARGEST[dtype]
    scaled = np.clip(kv.astype(np.float32) / np.repeat(scales.T, H, axis=1), -most, most)
    return (np.rint(scaled) if dtype == "int8" else scaled).astype(jnp.dtype(dtype))


def _exact(found: jax.Array, expected: np.ndarray) -> dict:
    """Equal bit for bit; the null block may hold anything."""
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    axis = 0 if expected.ndim == 4 else 1
    pairs = [np.take(np.asarray(x), range(1, x.shape[axis]), axis) for x in (found, expected)]
    a, b = (np.ascontiguousarray(x).view(bits) for x in pairs)
    same = np.array_equal(a, b)
    return {"ok": same} | ({} if same else {"error": "bits differ"})
