"""One decode step of the paged engine against one of the unpaged baseline, at equal batch.

python -m benchmarks.step [--batches 1 8 32] [--contexts 300 2000] [--roof]

A paged step is the engine's whole step: plan, pack, run, fetch the tokens, commit them. An unpaged
step is the baseline's: run, fetch. Both attend to the same number of tokens in every row. Prompts
are planned and given blocks but not computed, since a step's time does not depend on what the
memory holds; the baseline's rows likewise start in the middle. With --roof, beside each paged step
stands what it costs at least on this machine (benchmarks/roof.py), measured in the same turns.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baseline_model
from benchmarks.arguments import BLOCK_SIZES, at_least_one, repetition_penalty
from benchmarks.baseline import Baseline, best_cache_dtype
from benchmarks.measure import CompileLog, block_nbytes, provenance
from benchmarks.others import OthersShare
from benchmarks.roof import READ_BYTES, Weight, products, read_large, roof_of, weights_of
from jpaged import LLM, SamplingParams
from jpaged.engine import Engine
from jpaged.requests import Request
from jpaged_models import NamedTensors, load_decoder, open_named_tensors
from pallas_kernels import choose_backend

ROOF_HEADER = (
    f" {'roof ms':>8} {'share':>6} {'products':>9} {'KV':>6} {'weights MB':>11} {'KV MB':>7} "
    f"{'GFLOP':>7}"
)


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    compiles = CompileLog()
    checkpoint = open_named_tensors(options.model)
    params = baseline_model.load_params(checkpoint, dtype=options.dtype)
    weights = []
    if options.roof:
        weights = weights_of(load_decoder(checkpoint, dtype=jnp.dtype(options.dtype)))
    results = []
    print(
        f"{'batch':>5} {'context':>8} {'paged ms':>9} {'unpaged ms':>11} {'ratio':>6} "
        f"{'of minima':>10} {'others':>7}" + (ROOF_HEADER if options.roof else "")
    )
    for batch in options.batches:
        for result in _measure(options, checkpoint, params, weights, batch, compiles):
            results.append(result)
            print(_line(result), flush=True)
    backend = choose_backend(options.attention_backend, jax.devices()[0].platform)
    report = {
        "benchmark": "step",
        "dtype": options.dtype,
        "model": checkpoint.source,
        "attention": backend.value,
        "repetition_penalty": options.repetition_penalty,
    }
    print(json.dumps({**report, "results": results, **provenance()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", default="float32", help="of the weights, on both sides")
    add("--batches", type=at_least_one, nargs="+", default=[1, 8, 32])
    add("--contexts", type=at_least_one, nargs="+", default=[300, 2000])
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--attention-backend", default="auto", help="of the paged side; xla is plain jax.numpy too")
    add(
        "--repetition-penalty",
        type=repetition_penalty,
        default=1.0,
        help="of the paged side's rows; other than 1, its step also bends the logits",
    )
    add("--roof", action="store_true", help="also what the paged step costs at least")
    add("--rounds", type=at_least_one, default=5, help="the two sides take turns")
    add("--steps", type=at_least_one, default=8, help="steps of a turn")
    return parser.parse_args()


def _line(result: dict) -> str:
    share = result["others_share"]
    line = (
        f"{result['batch']:5} {result['context']:8} {result['paged_ms']:9.1f} "
        f"{result['unpaged_ms']:11.1f} {result['ratio']:6.2f} {result['ratio_of_minima']:10.2f} "
        + (7 * " " if share is None else f"{share:7.0%}")
    )
    if "roof" in result:
        roof = result["roof"]
        line += (
            f" {roof['ms']:8.1f} {roof['share']:6.0%} {roof['products_ms']:9.1f} "
            f"{roof['kv_ms']:6.1f} {roof['weight_bytes'] / 1e6:11.0f} "
            f"{roof['kv_bytes'] / 1e6:7.0f} {roof['flops'] / 1e9:7.1f}"
        )
    return line


def _measure(
    options: argparse.Namespace,
    checkpoint: NamedTensors,
    params: baseline_model.Params,
    weights: list[Weight],
    batch: int,
    compiles: CompileLog,
) -> list[dict]:
    """Both sides at one batch size, a result for each context."""
    num_steps = options.rounds * options.steps
    longest = max(options.contexts) + num_steps + options.block_size
    blocks_per_row = -(-longest // options.block_size)
    with LLM(
        options.model,
        dtype=options.dtype,
        block_size=options.block_size,
        num_blocks=batch * blocks_per_row + 1,
        max_num_seqs=batch,
        max_num_batched_tokens=batch * longest,  # all prompts are planned in one step
        max_model_len=longest,
        attention_backend=options.attention_backend,
        enable_prefix_caching=False,  # every row's prompt is the same
        warm_up=False,  # one program is all that is run
        async_scheduling=False,  # else it would go on computing in the baseline's turn
    ) as llm:
        baseline = Baseline(
            checkpoint.config,
            params,
            num_rows=batch,
            reserved=longest,
            cache_dtype=best_cache_dtype(llm.engine.runner.pool[0].dtype),
        )
        token_bytes = block_nbytes(llm) // options.block_size
        results = []
        for context in options.contexts:
            # Halfway through, the rows attend to `context` tokens.
            start = max(1, context - num_steps // 2)
            penalty = options.repetition_penalty
            paged = paged_step(llm.engine, batch, start, repetition_penalty=penalty)
            sides = [paged, _unpaged(baseline, start)]
            bounds = [products(weights, batch), read_large()] if weights else []
            for run in (*sides, *bounds):
                run()
            compiles.events.clear()
            load = OthersShare()
            seconds = _take_turns([*sides, *bounds], options)
            others_share = load.now()
            assert not compiles.events, "a step compiled while it was timed"
            held = [step() for step in sides]
            assert held == [start + num_steps + 2] * 2, f"rows hold {held} tokens, from {start} on"
            result = _result(batch, context, seconds[0], seconds[1], others_share)
            if weights:
                kv_bytes = batch * context * token_bytes
                result["roof"] = _roof(weights, result, kv_bytes, seconds[2], seconds[3])
            results.append(result)
    return results


def _take_turns(
    sides: list[Callable[[], object]], options: argparse.Namespace
) -> list[list[float]]:
    """The seconds of every run of every side."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(options.rounds):
        for side, times in zip(sides, seconds, strict=True):
            for _ in range(options.steps):
                start = time.perf_counter()
                side()
                times.append(time.perf_counter() - start)
        print(f"round {turn + 1}/{options.rounds}", file=sys.stderr)
    return seconds


def _result(
    batch: int,
    context: int,
    paged: list[float],
    unpaged: list[float],
    others_share: float | None,
) -> dict:
    """Medians, and the best steps: where others use the machine, their ratio is steadier."""
    medians = statistics.median(paged), statistics.median(unpaged)
    return {
        "batch": batch,
        "context": context,
        "paged_ms": round(medians[0] * 1e3, 2),
        "unpaged_ms": round(medians[1] * 1e3, 2),
        "ratio": round(medians[0] / medians[1], 3),
        "paged_min_ms": round(min(paged) * 1e3, 2),
        "unpaged_min_ms": round(min(unpaged) * 1e3, 2),
        "ratio_of_minima": round(min(paged) / min(unpaged), 3),
        "others_share": others_share,
    }


def _roof(
    weights: list[Weight],
    result: dict,
    kv_bytes: int,
    products_seconds: list[float],
    read_seconds: list[float],
) -> dict:
    """What the step costs at least, and its share in the best step; all are the best of their kind.

    A roof is what the machine can do when it is left alone.
    """
    roof = roof_of(
        weights,
        rows=result["batch"],
        kv_bytes=kv_bytes,
        products_ms=min(products_seconds) * 1e3,
        read_gbps=READ_BYTES / min(read_seconds) / 1e9,
    )
    share = roof.ms / result["paged_min_ms"]
    return {**dataclasses.asdict(roof), "ms": round(roof.ms, 2), "share": round(share, 3)}


def paged_step(
    engine: Engine, batch: int, context: int, *, repetition_penalty: float = 1.0
) -> Callable[[], int]:
    """The engine's step with `batch` rows of `context` tokens; returns what each then holds."""
    scheduler, runner = engine.scheduler, engine.runner
    for request_id in list(scheduler.requests):
        scheduler.abort(request_id)
    params = SamplingParams(
        temperature=0,
        max_tokens=None,
        ignore_eos=True,
        detokenize=False,
        repetition_penalty=repetition_penalty,
    )
    for index in range(batch):
        scheduler.add(
            Request(
                request_id=f"{index} at {context}",
                prompt=None,
                prompt_token_ids=[0] * context,
                params=params,
                seed=index,
            )
        )
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == batch * context, "every prompt fits the first plan"
    scheduler.commit(plan, [0] * batch)
    state = runner.state
    assert state is not None, "the runner has a state until it is closed"
    tables = np.zeros(state.block_tables.shape, np.int32)
    for sequence in scheduler.running:
        tables[sequence.row, : len(sequence.block_ids)] = sequence.block_ids
    runner.state = dataclasses.replace(state, block_tables=jnp.array(tables))

    def step() -> int:
        for sequence in engine.step():
            if sequence.request.error is not None:
                raise sequence.request.error
        return scheduler.num_tokens_held // batch

    return step


def _unpaged(baseline: Baseline, context: int) -> Callable[[], int]:
    """The baseline's step, likewise."""
    rows = baseline.rows_at(context)
    stop_ids = baseline.stop_ids(ignore_eos=True)

    def step() -> int:
        nonlocal rows
        rows = baseline.step(rows, stop_ids)
        np.array(rows.tokens)
        return int(np.array(rows.lens)[0])

    return step


if __name__ == "__main__":
    main()
