"""Every kernel on the device against float64 on the host: fresh inputs, NaN wherever no row is.

Tables name no block behind a context, and memory that a result is likely to get is NaN before.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import changes, large
from benchmarks.gpu.beside import refusal
from benchmarks.gpu.oracle import SCALE, Ragged, dense
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.gpu.specs import Spec, array_options, list_specs, make_case, plain_options
from benchmarks.gpu.timing import compile_all
from pallas_kernels import Backend, PagedBatch, paged_attention, paged_decode

# Norms of the error over norms of the result, of everything and of the worst token. A float32
# product that was rounded to TF32 exceeds its own.
BOUNDS = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
WORST_TOKEN = 4
ORACLE_THREADS = 4
MOSAIC = (Backend.MOSAIC_GPU, Backend.MOSAIC_GPU_INTERPRET)
# Their prompts' answers take the place of the queries, and padding tokens keep theirs.
IN_PLACE = (Backend.PALLAS_GPU, Backend.PALLAS_GPU_INTERPRET, *MOSAIC)
NUM_PROGRAMS = (5, 132)  # that share out many rows: a row's bits do not follow it


class Prepared(NamedTuple):
    """A case, its arrays, and what the host makes of them."""

    spec: Spec
    case: Ragged
    arrays: Mapping[str, np.ndarray]  # options
    expected: "Future[np.ndarray]"


def run(settings: Settings, record: Record) -> None:
    """Records each case of what is under test: attention, changes of the pool, large pools."""
    backend = Backend(settings.backend)
    check_attention(backend, settings, record)
    changes.check(backend, settings, record)


def check_attention(backend: Backend, settings: Settings, record: Record) -> None:
    """Records the error of each case that the backend takes, and whether it is within bounds."""
    specs = [spec for spec in list_specs(settings.scale) if settings.lacks(spec.name)]
    taken = [spec for spec in specs if _takes(backend, spec)]
    check_cases(((spec, make_case(spec, settings)) for spec in taken), backend, settings, record)
    if len(taken) < len(specs):
        left_out = f"{len(specs) - len(taken)} of {len(specs)} cases are not for it"
        record(f"cases of {backend.value}", {"ok": True, "error": left_out})
    for spec, case in large.cases(backend, settings, record):
        check_cases([(spec, case)], backend, settings, record)


def check_cases(
    cases: Iterable[tuple[Spec, Ragged]], backend: Backend, settings: Settings, record: Record
) -> None:
    """Records each; everything is compiled before anything is run."""
    with ThreadPoolExecutor(ORACLE_THREADS) as threads:
        prepared = []
        for spec, case in cases:
            arrays = array_options(spec, case, settings)
            options: dict[str, Any] = plain_options(spec) | {"sinks": arrays.get("sinks")}
            prepared.append(Prepared(spec, case, arrays, threads.submit(dense, case, **options)))
        compiled = compile_all(
            {one.spec.name: functools.partial(_lower, one, backend) for one in prepared}
        )
        for one in prepared:
            record_attempt(
                record,
                one.spec.name,
                functools.partial(_check, one, compiled[one.spec.name], backend),
            )


def record_attempt(record: Record, name: str, check: Callable[[], dict]) -> None:
    """Records what the check says, or what it raises."""
    record.begin(name)
    try:
        result = check()
    except Exception as reason:  # noqa: BLE001 - whatever it is, the other cases still count
        result = {"ok": False, "error": describe(reason)}
    record(name, result)


def _takes(backend: Backend, spec: Spec) -> bool:
    N, K, H = spec.heads
    pool = {"block_size": spec.block_size, "dtype": spec.pool_dtype or spec.dtype}
    return refusal(backend, head_size=H, queries_per_head=N // K, **pool) is None


def _arguments(one: Prepared) -> tuple[Any, ...]:
    """What the jitted function takes; the rows of decode include the padding ones."""
    case = one.case
    if one.spec.job == "decode":
        B = len(case.seq_lens)
        return case.q[:B], case.pool, (case.block_tables, case.seq_lens), one.arrays
    batch = PagedBatch(
        jnp.asarray(case.block_tables),
        jnp.asarray(case.query_starts),
        jnp.asarray(case.seq_lens),
        jnp.int32(case.num_decodes),
    )
    return case.q, case.pool, (batch,), one.arrays


def _lower(one: Prepared, backend: Backend) -> jax.stages.Lowered:
    function = paged_decode if one.spec.job == "decode" else paged_attention

    def attend(q: Any, pool: Any, rows: Any, arrays: Any) -> jax.Array:
        options = plain_options(one.spec)
        return function(q, pool, *rows, scale=SCALE, backend=backend, **options, **arrays)

    return jax.jit(attend).lower(*_arguments(one))


def _check(one: Prepared, program: Any, backend: Backend) -> dict:
    if isinstance(program, Exception):
        return {"ok": False, "error": describe(program)}
    spec, case, expected = one.spec, one.case, one.expected.result()
    arguments = jax.device_put(_arguments(one))
    poison(case.q.shape, case.q.dtype)
    found = program(*arguments)
    out = np.asarray(found).astype(np.float64)
    problems = _check_padding(spec, case, out, backend)
    if spec.job == "decode":
        problems += _check_independence(case, program, arguments, out)
        if spec.rows == "many" and backend in MOSAIC:
            problems += _check_programs(spec, backend, arguments, found)
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


def _check_padding(spec: Spec, case: Ragged, out: np.ndarray, backend: Backend) -> list[str]:
    """What stands behind the rows' tokens: zeros in decode, in prompts the queries."""
    padding = out[case.num_tokens :]
    if spec.job == "decode":
        return ["rows of length 0 are not zeros"] if padding.any() else []
    if backend not in IN_PLACE:  # of the others nobody may ask what stands there
        return []
    queries = case.q[case.num_tokens :].astype(np.float64)
    return [] if np.array_equal(padding, queries) else ["padding tokens were written to"]


def _check_independence(
    case: Ragged, program: jax.stages.Compiled, arguments: tuple[Any, ...], out: np.ndarray
) -> list[str]:
    """A row's bits must not depend on the other rows: every second one is made empty."""
    q, pool, (tables, _), arrays = arguments
    kept_B = np.arange(len(case.seq_lens)) % 2 == 0
    fewer = jax.device_put(np.where(kept_B, case.seq_lens, 0).astype(np.int32))
    poison(case.q.shape, case.q.dtype)
    alone = np.asarray(program(q, pool, (tables, fewer), arrays)).astype(np.float64)
    problems = []
    if not np.array_equal(alone[kept_B], out[kept_B]):
        problems.append("a row's bits depend on its neighbours")
    if alone[~kept_B].any():
        problems.append("rows of length 0 among others are not zeros")
    return problems


def _check_programs(
    spec: Spec, backend: Backend, arguments: tuple[Any, ...], found: jax.Array
) -> list[str]:
    """Nor on how many programs share the rows out."""
    q, pool, rows, arrays = arguments
    problems = []
    for count in NUM_PROGRAMS:
        attend = functools.partial(
            mosaic_decode(spec.heads[2], count, backend),
            scale=SCALE,
            **plain_options(spec),
        )
        other = jax.jit(attend)(q, pool, *rows, **arrays)
        if not np.array_equal(np.asarray(other), np.asarray(found)):
            problems.append(f"other bits of {count} programs")
    return problems


def mosaic_decode(head_size: int, num_programs: int, backend: Backend) -> Callable[..., jax.Array]:
    """The kernel in so many programs."""
    kernel = importlib.import_module("pallas_kernels.gpu.mosaic.decode")  # an older JAX has it not
    config = dataclasses.replace(kernel.decode_config(head_size), num_programs=num_programs)
    interpret = backend is Backend.MOSAIC_GPU_INTERPRET
    return functools.partial(kernel.paged_decode, config=config, interpret=interpret)


def poison(shape: tuple[int, ...], dtype: Any) -> None:
    """Fills memory that the next result of this shape will likely get with NaN, and frees it."""
    nothing = np.full(shape, np.nan, dtype)
    jax.block_until_ready([jax.device_put(nothing) for _ in range(4)])
