"""Every kernel on the device against float64 on the host: fresh inputs, NaN wherever no row is.

A case is run with what is under test, and after all cases with what is tested besides
(`beside.py`), under a name that ends with that backend's; either runs what it takes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.beside import refusal, second_backend
from benchmarks.gpu.oracle import SCALE, Ragged, dense, make_ragged
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.gpu.timing import compile_all
from pallas_kernels import Backend, PagedBatch, copy_blocks, paged_attention, paged_decode, write_kv

Heads = tuple[int, int, int]

HEADS: list[Heads] = [
    (32, 8, 128),
    (9, 3, 64),
    (14, 2, 64),
    (8, 8, 96),
    (16, 2, 80),
    (8, 4, 256),
]
OPTIONS: list[dict[str, Any]] = [
    {"window": 100},
    {"window": 700, "soft_cap": 5.0},
    {"soft_cap": 3.0},
]
# Around blocks, tiles and splits of 256 and 512 tokens; the lone one is a row of its own length.
DECODE_LENS = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 777, 1025, 1601]
RAGGED_ROWS = [(1, 1), (1, 16), (1, 333), (1, 1200), (2, 2), (64, 64), (17, 530), (130, 130)]
RAGGED_ROWS += [(128, 700), (65, 1030), (5, 300)]

# Norms of the error over norms of the result, of everything and of the worst token. A float32
# product that was rounded to TF32 exceeds its own.
BOUNDS = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
WORST_TOKEN = 4
ORACLE_THREADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One case."""

    job: str  # "decode" or "ragged"
    heads: Heads
    block_size: int = 16
    dtype: str = "bfloat16"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in the results."""
        heads = "/".join(map(str, self.heads))
        extras = "".join(f" {key}={value}" for key, value in self.options.items())
        return f"{self.job} {heads} block {self.block_size} {self.dtype}{extras}"


class Prepared(NamedTuple):
    """A case, its arrays, and what the host makes of them."""

    spec: Spec
    case: Ragged
    expected: "Future[np.ndarray]"


def run(settings: Settings, record: Record) -> None:
    """Records the error of each case, and whether it is within bounds."""
    backend, second = Backend(settings.backend), second_backend(settings, record)
    with ThreadPoolExecutor(ORACLE_THREADS) as threads:
        prepared = []
        for spec in _specs(settings.scale):
            case = _case(spec, settings)
            expected = threads.submit(dense, case, **spec.options)
            prepared.append(Prepared(spec, case, expected))
        _run_cases({one.spec.name: one for one in prepared}, backend, record)
        for dtype in ("bfloat16", "float32"):
            record(f"write_kv {dtype}", _check_write(dtype, backend, settings.seed))
            record(f"copy_blocks {dtype}", _check_copies(dtype, backend, settings.seed))
        if second is not None:
            named = {f"{one.spec.name} {second.value}": one for one in prepared}
            _run_cases(named, second, record)


def _run_cases(named: dict[str, Prepared], backend: Backend, record: Record) -> None:
    """Those that the backend takes; everything is compiled before anything is run."""
    mine = {name: one for name, one in named.items() if _takes(backend, one.spec)}
    compiled = compile_all(
        {name: functools.partial(_lower, one.spec, one.case, backend) for name, one in mine.items()}
    )
    for name, (spec, case, expected) in mine.items():
        program = compiled[name]
        if isinstance(program, Exception):
            record(name, {"ok": False, "error": describe(program)})
            continue
        try:
            record(name, _check(spec, case, program, expected.result()))
        except Exception as reason:  # noqa: BLE001 - whatever it is, the other cases still count
            record(name, {"ok": False, "error": describe(reason)})
    if len(mine) < len(named):
        left_out = f"{len(named) - len(mine)} of {len(named)} cases are not for it"
        record(f"cases of {backend.value}", {"ok": True, "error": left_out})


def _takes(backend: Backend, spec: Spec) -> bool:
    pool = {"block_size": spec.block_size, "dtype": spec.dtype, "head_size": spec.heads[2]}
    return refusal(backend, **pool) is None


def _specs(scale: str) -> Iterator[Spec]:
    jobs = ("decode", "ragged")
    if scale == "toy":
        yield Spec(job="decode", heads=(6, 3, 16), options={"window": 20})
        yield Spec(job="ragged", heads=(6, 3, 16), block_size=8)
        return
    common, odd = HEADS[:2], HEADS[-1]
    for job in jobs:
        for heads in HEADS:
            yield Spec(job=job, heads=heads)
        for heads in common:
            for block_size in (8, 64, 128):
                yield Spec(job=job, heads=heads, block_size=block_size)
            for options in OPTIONS:
                yield Spec(job=job, heads=heads, options=options)
        for heads in (*common, odd):
            for dtype in ("float16", "float32"):
                yield Spec(job=job, heads=heads, dtype=dtype)


def _case(spec: Spec, settings: Settings) -> Ragged:
    rows = [(1, length) for length in DECODE_LENS] if spec.job == "decode" else RAGGED_ROWS
    if settings.scale == "toy":
        rows = [(queries, context) for queries, context in rows if context <= 65]
    seed = settings.seed + sum(map(ord, spec.name))
    return make_ragged(
        rows, heads=spec.heads, block_size=spec.block_size, dtype=spec.dtype, seed=seed
    )


def _arguments(spec: Spec, case: Ragged) -> tuple[Any, ...]:
    """What the jitted function takes; the rows of decode include the padding ones."""
    if spec.job == "decode":
        B = len(case.seq_lens)
        return case.q[:B], case.pool, case.block_tables, case.seq_lens
    batch = PagedBatch(
        jnp.asarray(case.block_tables),
        jnp.asarray(case.query_starts),
        jnp.asarray(case.seq_lens),
        jnp.int32(case.num_decodes),
    )
    return case.q, case.pool, batch


def _lower(spec: Spec, case: Ragged, backend: Backend) -> jax.stages.Lowered:
    function = paged_decode if spec.job == "decode" else paged_attention

    def attend(*arrays: Any) -> jax.Array:
        return function(*arrays, scale=SCALE, backend=backend, **spec.options)

    return jax.jit(attend).lower(*_arguments(spec, case))


def _check(spec: Spec, case: Ragged, program: jax.stages.Compiled, expected: np.ndarray) -> dict:
    arguments = jax.device_put(_arguments(spec, case))
    poison(case.q.shape, case.q.dtype)
    out = np.asarray(program(*arguments)).astype(np.float64)
    problems = []
    if spec.job == "decode":
        num_rows = len(case.contexts)
        if out[num_rows:].any():
            problems.append("rows of length 0 are not zeros")
        problems += _check_independence(case, program, arguments, out)
    out = out[: len(expected)]
    finite = bool(np.isfinite(out).all())
    errors_T = np.linalg.norm((out - expected).reshape(len(out), -1), axis=1)
    error = float(np.linalg.norm(errors_T) / np.linalg.norm(expected))
    worst = float((errors_T / np.linalg.norm(expected.reshape(len(out), -1), axis=1)).max())
    bound = BOUNDS[spec.dtype]
    if not finite:
        problems.append("not finite")
    elif error > bound or worst > WORST_TOKEN * bound:
        problems.append("over the bound")
    result = {"ok": not problems, "error_norm": error, "worst_token": worst, "bound": bound}
    return result | ({"error": "; ".join(problems)} if problems else {})


def _check_independence(
    case: Ragged, program: jax.stages.Compiled, arguments: tuple[Any, ...], out: np.ndarray
) -> list[str]:
    """A row's bits must not depend on the other rows: every second one is made empty."""
    q, pool, tables, _ = arguments
    kept_B = np.arange(len(case.seq_lens)) % 2 == 0
    fewer = jax.device_put(np.where(kept_B, case.seq_lens, 0).astype(np.int32))
    poison(case.q.shape, case.q.dtype)
    alone = np.asarray(program(q, pool, tables, fewer)).astype(np.float64)
    problems = []
    if not np.array_equal(alone[kept_B], out[kept_B]):
        problems.append("a row's bits depend on its neighbours")
    if alone[~kept_B].any():
        problems.append("rows of length 0 among others are not zeros")
    return problems


def poison(shape: tuple[int, ...], dtype: Any) -> None:
    """Fills memory that the next result of this shape will likely get with NaN, and frees it."""
    nothing = np.full(shape, np.nan, dtype)
    jax.block_until_ready([jax.device_put(nothing) for _ in range(4)])


def _check_write(dtype: str, backend: Backend, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    P, K, S, H, T = 37, 3, 16, 64, 200
    pool = rng.standard_normal((P, K, S, 2 * H)).astype(jnp.dtype(dtype))
    pool[5] = np.nan
    k, v = (rng.standard_normal((T, K, H)).astype(jnp.dtype(dtype)) for _ in range(2))
    slots = rng.permutation(np.arange(S, P * S))[:T].astype(np.int32)
    slots[-3:] = 0  # padding tokens all write to the null block
    expected = pool.copy()
    expected[slots // S, :, slots % S] = np.concatenate([k, v], axis=-1)
    write = jax.jit(lambda *arrays: write_kv(*arrays, backend=backend), donate_argnums=0)
    return _exact(write(jnp.array(pool), k, v, slots), expected)


def _check_copies(dtype: str, backend: Backend, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    pools = rng.standard_normal((2, 29, 3, 8, 32)).astype(jnp.dtype(dtype))
    copies = rng.permutation(np.arange(1, 29))[:14].reshape(7, 2).astype(np.int32)
    copies[1, 0] = copies[0, 1]  # the source of one is what the one before it wrote
    expected = pools.copy()
    for source, destination in copies[:5]:
        expected[:, destination] = expected[:, source]
    copy = jax.jit(functools.partial(copy_blocks, backend=backend), donate_argnums=0)
    found = copy(tuple(map(jnp.array, pools)), copies, np.int32(5))
    return _exact(jnp.stack(found), expected)


def _exact(found: jax.Array, expected: np.ndarray) -> dict:
    """Equal bit for bit; the null block may hold anything."""
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    axis = 0 if expected.ndim == 4 else 1
    pairs = [np.take(np.asarray(x), range(1, x.shape[axis]), axis) for x in (found, expected)]
    a, b = (np.ascontiguousarray(x).view(bits) for x in pairs)
    same = np.array_equal(a, b)
    return {"ok": same} | ({} if same else {"error": "bits differ"})
