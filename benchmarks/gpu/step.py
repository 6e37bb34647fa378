"""A decode step of the whole model on random weights, against the bytes that it must read.

`whole` is the engine's step as a caller sees it: plan, pack, run, fetch, commit. `device` is the
same program run again and again without waiting, so that the host's part overlaps. The floor is
the time to read the weights and the live KV once, at the measured read bandwidth. What is tested
besides (`beside.py`) comes last.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu.beside import second_backend
from benchmarks.gpu.inputs import random_array, random_key
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.random_checkpoint import LLAMA_8B, SMOLLM2, TINY
from benchmarks.step import paged_step
from jpaged.config import EngineConfig
from jpaged.devices import first_device
from jpaged.engine import Engine
from jpaged.loading import engine_for
from jpaged.memory import block_bytes
from jpaged.plan import StepPlan
from jpaged.programs import PlainStep
from jpaged_models import Decoder, ModelConfig, abstract_decoder, config_from_hf
from pallas_kernels import Backend

DTYPE = jnp.bfloat16
BLOCK_SIZE = 16
STEPS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """A model, and rows of equal context."""

    name: str
    config: dict
    batches: tuple[tuple[int, int], ...]  # rows x context


SHAPES = {
    "full": [
        StepShape(name="SmolLM2-135M", config=SMOLLM2, batches=((64, 1024), (1, 1024))),
        StepShape(name="Llama-8B", config=LLAMA_8B, batches=((64, 2048),)),
    ],
    "toy": [StepShape(name="tiny", config=TINY, batches=((3, 40),))],
}


class Case(NamedTuple):
    """An engine whose one decode program is compiled, and the rows that it is to step."""

    name: str
    engine: Engine
    config: ModelConfig
    rows: int
    context: int


def run(settings: Settings, record: Record) -> None:
    """Records milliseconds of a step; everything is compiled before anything is timed."""
    _measure(settings, record, backends=(settings.backend, "xla"))
    if (second := second_backend(settings, record)) is not None:
        _measure(settings, record, backends=(second.value,))


def _measure(settings: Settings, record: Record, *, backends: Iterable[str]) -> None:
    for case in compiled_cases(settings, record, backends=backends):
        record.begin(case.name)
        result = _time(case)
        record(case.name, result | _against_floor(result, case, settings))


def compiled_cases(settings: Settings, record: Record, *, backends: Iterable[str]) -> list[Case]:
    """Every shape that is wanted by every backend; what fails to compile is recorded instead."""
    cases: list[Case] = []
    for shape in SHAPES[settings.scale]:
        if not settings.wants(shape.name):
            continue
        config = config_from_hf(shape.config)
        wanted = [
            (f"{shape.name} {rows} x {context} {backend}", rows, context, Backend(backend))
            for rows, context in shape.batches
            for backend in dict.fromkeys(backends)
        ]
        wanted = [one for one in wanted if settings.lacks(one[0])]
        if not wanted:
            continue
        decoder = random_decoder(config, seed=settings.seed)
        for name, rows, context, backend in wanted:
            engine = _engine(decoder, rows, context, backend)
            cases.append(Case(name, engine, config, rows, context))
    failures = _compile([case.engine for case in cases])
    for case, failure in zip(cases, failures, strict=True):
        if failure is not None:
            record(case.name, {"ok": False, "error": describe(failure)})
    return [case for case, failure in zip(cases, failures, strict=True) if failure is None]


def _compile(engines: list[Engine]) -> list[Exception | None]:
    """Compiles each engine's one decode program, several at once; what that failed with."""

    def compile_one(engine: Engine) -> Exception | None:
        runner = engine.runner
        program = PlainStep(runner.buckets.decode[-1])
        try:
            runner.programs[program] = runner.compile(program)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others still count
            return error
        return None

    with ThreadPoolExecutor() as threads:
        return list(threads.map(compile_one, engines))


def random_decoder(config: ModelConfig, *, seed: int) -> Decoder:
    """Random weights made on the device, one compilation for each shape; norms are ones."""
    graph, abstract = nnx.split(abstract_decoder(config, dtype=DTYPE))
    leaves, tree = jax.tree.flatten(abstract)
    filled: list[Any] = []
    for index, leaf in enumerate(leaves):
        if leaf.ndim == 1:
            filled.append(jnp.ones(leaf.shape, DTYPE))
        else:
            filled.append(0.02 * random_array(random_key(seed + index), leaf.shape, DTYPE))
    return nnx.merge(graph, jax.tree.unflatten(tree, filled))


def _engine(decoder: Decoder, rows: int, context: int, backend: Backend) -> Engine:
    longest = context + 4 * STEPS + BLOCK_SIZE
    limits = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=rows * math.ceil(longest / BLOCK_SIZE) + 1,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * longest,  # all prompts are planned in one step
        max_model_len=longest,
        enable_prefix_caching=False,  # every row's prompt is the same
    )
    return engine_for(
        decoder,
        None,
        limits,
        pool_dtype=DTYPE,
        backend=backend,
        device=first_device(),
        memory_fraction=None,
    )


def _time(case: Case) -> dict:
    engine, rows = case.engine, case.rows
    # Two tokens more than the steps take: at the border of a block all rows would begin another.
    step = paged_step(engine, rows, case.context - STEPS - 2)
    step()
    whole = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        whole.append(time.perf_counter() - start)
    plan = engine.scheduler.schedule()
    assert plan is not None, "every row goes on"
    device = []
    for _ in range(5):
        start = time.perf_counter()
        run_without_waiting(engine, plan)
        device.append((time.perf_counter() - start) / STEPS)
    return {
        "ok": True,
        "ms": round(statistics.median(device) * 1e3, 3),
        "whole_ms": round(statistics.median(whole) * 1e3, 3),
        "spread_ms": round((max(device) - min(device)) * 1e3, 3),
        "tokens_per_s": round(rows / statistics.median(whole), 1),
    }


def run_without_waiting(engine: Engine, plan: StepPlan) -> None:
    """STEPS times the same step, which writes the same slots, and a wait for the last."""
    out = [engine.runner.run(plan) for _ in range(STEPS)][-1]
    jax.block_until_ready(out)


def _against_floor(result: dict, case: Case, settings: Settings) -> dict:
    config = case.config
    weights = jax.tree.leaves(nnx.split(abstract_decoder(config, dtype=DTYPE))[1])
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    if not config.tie_word_embeddings:  # of the embedding only the tokens' rows are read
        num_bytes -= config.vocab_size * config.hidden_size * jnp.dtype(DTYPE).itemsize
    token_bytes = block_bytes(config, block_size=1, dtype=DTYPE, backend=Backend.PALLAS_GPU)
    num_bytes += case.rows * case.context * token_bytes
    found = {"read_bytes": num_bytes}
    if settings.read_gbps is not None:
        floor_ms = num_bytes / settings.read_gbps / 1e6
        found |= {"floor_ms": round(floor_ms, 3), "of_floor": round(result["ms"] / floor_ms, 3)}
    return found
