"""Greedy tokens of the whole engine: the kernels' against those of `xla`, on random weights.

The requests share a prefix and do not all fit the pool, so that a sequence is preempted and a
prefix is found again. Where a sequence's tokens first differ, the kernels' must be almost as likely
to `xla` as its own: in float32, with exact products, but for rounding; in bfloat16, where either
side rounds on its own, within what that moves a logit. A dtype whose pool the kernels do not take
is named with the reason; where they take none, nothing was compared, and that is a failure.
"""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.beside import refusal
from benchmarks.gpu.settings import Record, Settings
from benchmarks.random_checkpoint import SMOLLM2, TINY, write_checkpoint
from jpaged import LLM, SamplingParams
from jpaged.engine import Engine
from jpaged_models import config_from_hf
from pallas_kernels import Backend, choose_backend

# Log-probabilities by which the kernels' token may fall short of the likeliest. In bfloat16 those
# of two sound backends were up to 0.12 apart (`cpu` and `xla` on a CPU, 19 requests); a token
# picked at random is behind by several times the bound.
NEAR_TIES = {"float32": 1e-3, "bfloat16": 0.25}
RANKS = 20  # of the likeliest tokens, that the kernels' may be among
MIN_DISTINCT = 10  # tokens in all answers: a model that repeats itself shows little
BASE = "xla"
DTYPES = (("float32", "highest"), ("bfloat16", None))  # and the precision of products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests and the engine's limits."""

    config: dict
    prompt_lens: tuple[int, ...]
    prefix: int  # tokens that every third prompt begins with
    max_tokens: int
    limits: dict[str, Any]


WORKLOADS = {
    "full": Workload(
        config=SMOLLM2,
        prompt_lens=(3, 200, 17, 350, 64, 90, 33, 128, 5, 260, 80, 31, 1, 150, 48, 77, 300, 99),
        prefix=64,
        max_tokens=48,
        limits={
            "block_size": 16,
            "num_blocks": 73,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 256,
            "max_model_len": 512,
        },
    ),
    "toy": Workload(
        config=TINY,
        prompt_lens=(3, 40, 17, 35, 9, 28),
        prefix=16,
        max_tokens=20,
        limits={
            "block_size": 8,
            "num_blocks": 14,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_model_len": 96,
        },
    ),
}


def run(settings: Settings, record: Record) -> None:
    """Records the agreement of what is under test, in either dtype."""
    tested = choose_backend(settings.backend, jax.devices()[0].platform)
    check_tokens(tested, settings, record)


def check_tokens(backend: Backend, settings: Settings, record: Record) -> None:
    """Records the agreement of a backend in each dtype that it takes."""
    workload = WORKLOADS[settings.scale]
    dtypes = list(_dtypes(workload, backend, record))
    if not dtypes:
        record("any tokens", {"ok": False, "error": f"{backend.value} takes no dtype of these"})
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(pathlib.Path(folder), workload.config, seed=settings.seed)
        for dtype, precision in dtypes:
            if settings.lacks(f"{dtype} events"):  # the last of the dtype's
                record.begin(f"{dtype} tokens")
                # For the whole process: the engine compiles on threads of its own.
                jax.config.update("jax_default_matmul_precision", precision)
                _check_dtype(dtype, model, workload, backend, settings, record)


def _check_dtype(
    dtype: str,
    model: pathlib.Path,
    workload: Workload,
    backend: Backend,
    settings: Settings,
    record: Record,
) -> None:
    sides = [_engine(model, workload, dtype, name) for name in (BASE, backend.value)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda llm: llm.engine.runner.warm_up(), sides))
    prompts = _prompts(workload, settings.seed)
    answers = [_answers(llm, prompts, workload) for llm in sides]
    record(f"{dtype} tokens", _compare(prompts, answers, sides[0], dtype))
    record(f"{dtype} events", _events(sides))
    for llm in sides:
        llm.close()


def _dtypes(
    workload: Workload, backend: Backend, record: Record
) -> Iterator[tuple[str, str | None]]:
    """Those that the backend takes, with their precision; of others it records why not."""
    config = config_from_hf(workload.config)
    block_size = workload.limits["block_size"]
    for dtype, precision in DTYPES:
        reason = refusal(
            backend,
            block_size=block_size,
            dtype=dtype,
            head_size=config.head_size,
            queries_per_head=config.group_size,
        )
        if reason is None:
            yield dtype, precision
        else:
            record(f"{dtype} tokens", {"ok": True, "error": reason})


def _engine(model: pathlib.Path, workload: Workload, dtype: str, backend: str) -> LLM:
    llm = LLM(
        model,
        dtype=dtype,
        attention_backend=backend,
        warm_up=False,
        use_tqdm=False,
        **workload.limits,
    )
    keep_largest_programs(llm.engine)
    return llm


def keep_largest_programs(engine: Engine) -> None:
    """Leaves one program for decode steps and one for all others: compiling takes most time."""
    buckets = engine.runner.buckets
    del buckets.decode[:-1], buckets.mixed[:-1]


def _prompts(workload: Workload, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    V = workload.config["vocab_size"]
    prefix = rng.integers(3, V, workload.prefix).tolist()
    prompts = [rng.integers(3, V, length).tolist() for length in workload.prompt_lens]
    return [prefix + p if index % 3 == 0 else p for index, p in enumerate(prompts)]


def _answers(llm: LLM, prompts: list[list[int]], workload: Workload) -> list[list[int]]:
    """All at once, and the first again afterwards, when its prefix is cached."""
    params = SamplingParams(
        temperature=0, max_tokens=workload.max_tokens, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    outputs += llm.generate(prompts[:1], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _compare(
    prompts: list[list[int]], answers: list[list[list[int]]], base: LLM, dtype: str
) -> dict:
    """How many tokens agree up to each sequence's first difference, and how far that is apart."""
    same = total = 0
    behind: list[float] = []
    for prompt, expected, found in zip([*prompts, prompts[0]], *answers, strict=True):
        first = next(
            (i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]),
            len(expected),
        )
        same, total = same + first, total + len(expected)
        if first < len(expected):
            behind.append(_behind(base, prompt + expected[:first], found[first]))
    distinct = len({token for tokens in answers[1] for token in tokens})
    farthest, bound = max(behind, default=0.0), NEAR_TIES[dtype]
    problems = []
    if farthest > bound:
        apart = f"{farthest:.1e}" if math.isfinite(farthest) else f"more than {RANKS} ranks"
        problems.append(f"a token is {apart} less likely than the likeliest, at most {bound} are")
    if distinct < MIN_DISTINCT:
        problems.append(f"{distinct} distinct tokens show too little, {MIN_DISTINCT} are needed")
    result = {
        "ok": not problems,
        "same_tokens": same / total,
        "tokens": total,
        "distinct_tokens": distinct,
        "differences": len(behind),
        "farthest": farthest,
    }
    return result | ({"error": "; ".join(problems)} if problems else {})


def _behind(llm: LLM, prompt: list[int], token: int) -> float:
    """How much less likely the token is than the likeliest; infinite if it is of a lower rank."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=RANKS, detokenize=False)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None, "they were asked for"
    found = {token: entry.logprob for token, entry in logprobs[0].items()}
    return max(found.values()) - found.get(token, -math.inf)


def _events(sides: list[LLM]) -> dict:
    """What the workload is made for must have happened on both sides."""
    stats = [llm.engine.stats() for llm in sides]
    preemptions = [one.preemptions for one in stats]
    hits = [round(one.hit_rate, 3) for one in stats]
    ok = all(preemptions) and all(hits)
    result = {"ok": ok, "preemptions": preemptions, "hit_rates": hits}
    return result | ({} if ok else {"error": f"no preemption {preemptions} or no hit {hits}"})
