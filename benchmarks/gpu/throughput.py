"""Tokens a second of the whole engine on random weights, beside the unpaged baseline.

As benchmarks.throughput, which compares more, at equal bytes of keys and values: but for one
program each for decode steps and for all others, since compiling takes most of the time.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks import baseline_model
from benchmarks.baseline import Baseline
from benchmarks.gpu.parity import keep_largest_programs
from benchmarks.gpu.settings import Record, Settings
from benchmarks.lengths import random_prompts, sharegpt_lengths
from benchmarks.random_checkpoint import SMOLLM2, TINY, write_checkpoint
from jpaged import LLM, SamplingParams
from jpaged_models import open_named_tensors

DTYPE = "bfloat16"
BLOCK_SIZE = 16
REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The requests, and the memory of both sides."""

    config: dict
    requests: int
    max_input: int
    max_output: int
    rows: int  # of the baseline, each with `reserved` tokens
    reserved: int
    max_num_seqs: int
    max_num_batched_tokens: int


LOADS = {
    "full": Load(
        config=SMOLLM2,
        requests=192,
        max_input=512,
        max_output=256,
        rows=16,
        reserved=2048,
        max_num_seqs=192,
        max_num_batched_tokens=1024,
    ),
    "toy": Load(
        config=TINY,
        requests=6,
        max_input=20,
        max_output=8,
        rows=2,
        reserved=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
    ),
}


def run(settings: Settings, record: Record) -> None:
    """Records either side's tokens a second; compiles both first."""
    load = LOADS[settings.scale]
    lengths = [
        pair.clipped(max_input=load.max_input, max_output=load.max_output)
        for pair in sharegpt_lengths(load.requests, seed=0)
    ]
    prompts = random_prompts(lengths, vocab_size=load.config["vocab_size"], seed=0)
    max_tokens = [pair.output_tokens for pair in lengths]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        model = write_checkpoint(pathlib.Path(folder), load.config, seed=settings.seed)
        llm, baseline = _engine(model, load, settings.backend), _baseline(model, load)
        compiled = [
            threads.submit(llm.engine.runner.warm_up),
            threads.submit(baseline.warm_up, load.max_input),
        ]
        for one in compiled:
            one.result()
    sides = {
        f"paged {settings.backend}": (functools.partial(_paged, llm, prompts, max_tokens), REPEATS),
        "unpaged": (
            functools.partial(baseline.generate, prompts, max_tokens, ignore_eos=True),
            1,  # it takes long, and its time hardly varies
        ),
    }
    rates = {}
    for name, (generate, repeats) in sides.items():
        record.begin(name)
        rates[name], result = _rate(generate, repeats, max_tokens)
        if "unpaged" in rates:
            result["paged_over"] = round(rates[f"paged {settings.backend}"] / rates["unpaged"], 2)
        record(name, result)


def _engine(model: pathlib.Path, load: Load, backend: str) -> LLM:
    llm = LLM(
        model,
        dtype=DTYPE,
        attention_backend=backend,
        block_size=BLOCK_SIZE,
        num_blocks=load.rows * load.reserved // BLOCK_SIZE + 1,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=load.max_num_batched_tokens,
        max_model_len=load.reserved,
        warm_up=False,
        use_tqdm=False,
    )
    keep_largest_programs(llm.engine)
    return llm


def _baseline(model: pathlib.Path, load: Load) -> Baseline:
    checkpoint = open_named_tensors(model)
    params = baseline_model.load_params(checkpoint, dtype=DTYPE)
    platform_dtype = DTYPE if jax.devices()[0].platform == "gpu" else "float32"
    baseline = Baseline(
        checkpoint.config,
        params,
        num_rows=load.rows,
        reserved=load.reserved,
        cache_dtype=platform_dtype,
    )
    baseline.ladder = [n for n in (64, 256, 512) if n < load.reserved] + [load.reserved]
    checkpoint.close()
    return baseline


def _paged(llm: LLM, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, detokenize=False)
        for limit in max_tokens
    ]
    assert llm.reset_prefix_cache(), "an earlier round left its prompts"
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _rate(
    generate: Callable[[], list[list[int]]], repeats: int, max_tokens: list[int]
) -> tuple[float, dict]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answers = generate()
        seconds.append(time.perf_counter() - start)
        assert [len(tokens) for tokens in answers] == max_tokens, "a request ended early"
    rate = sum(max_tokens) / statistics.median(seconds)
    return rate, {
        "ok": True,
        "tokens_per_s": round(rate, 1),
        "seconds": [round(second, 2) for second in seconds],
        "output_tokens": sum(max_tokens),
    }
