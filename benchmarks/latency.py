"""Latency of one batch, in the paged engine and in the unpaged baseline.

python -m benchmarks.latency [--batch-size 8] [--input-len 32] [--output-len 128]

All prompts are handed in at once and the batch is timed until its last answer ends: E2EL. TTFT and
TPOT are those of each request in it, TPOT without the first token. Prompts are random tokens,
lengths of answers are forced, decoding is greedy. Both sides have room for the
whole batch, the baseline with a row for each request that reserves exactly what it needs: its best
case. They take turns.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable

import jax

from benchmarks import baseline_model
from benchmarks.arguments import (
    BACKENDS,
    BLOCK_SIZES,
    at_least_one,
    at_least_zero,
    file_to_write,
)
from benchmarks.arrivals import Arrival
from benchmarks.baseline import MIN_RESERVED, Baseline, best_cache_dtype
from benchmarks.lengths import RequestLengths, random_prompts
from benchmarks.measure import CompileLog, Timing, interleaved, provenance
from benchmarks.open_loop import RealClock, Served, Server, replay
from benchmarks.paged_server import PagedServer
from benchmarks.plot import has_matplotlib
from benchmarks.plot_latency import draw
from benchmarks.serving_metrics import summary, token_metrics
from benchmarks.unpaged_server import Refill, UnpagedServer
from jpaged import LLM
from jpaged_models import open_named_tensors


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    compiles = CompileLog()
    checkpoint = open_named_tensors(options.model)
    print("warming up", file=sys.stderr)
    llm = _engine(options)
    params = baseline_model.load_params(checkpoint, dtype=options.dtype)
    baseline = Baseline(
        checkpoint.config,
        params,
        num_rows=options.batch_size,
        reserved=max(MIN_RESERVED, options.input_len + options.output_len),
        cache_dtype=best_cache_dtype(jax.tree.leaves(llm.engine.runner.pool)[0].dtype),
    )
    starts: dict[str, Callable[[], Server]] = {
        "paged": lambda: PagedServer(llm),
        "unpaged": lambda: UnpagedServer(baseline, Refill.WHEN_ALL_ENDED),
    }
    served: dict[str, list[Served]] = {name: [] for name in starts}

    def run(name: str) -> None:
        batch = _batch(options, vocab_size=checkpoint.config.vocab_size)
        served[name] += replay(starts[name](), batch, RealClock()).served

    runs = {name: functools.partial(run, name) for name in starts}
    for warm_up in list(runs.values()) * options.num_iters_warmup:
        warm_up()  # the baseline compiles in it
    compiles.events.clear()
    for found in served.values():
        found.clear()
    report = _report(options, served, interleaved(runs, repeats=options.num_iters))
    report["compiles_after_warm_up"] = len(compiles.events)
    _print_table(report)
    print(json.dumps({**report, "model": checkpoint.source, **provenance()}), flush=True)
    if options.plot:
        draw(report, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", default="float32", help="of weights and cache, on both sides")
    add("--batch-size", type=at_least_one, default=8)
    add("--input-len", type=at_least_one, default=32, help="tokens of each prompt")
    add("--output-len", type=at_least_one, default=128, help="tokens of each answer")
    add("--num-iters", type=at_least_one, default=5, help="batches behind each figure")
    add("--num-iters-warmup", type=at_least_one, default=1, help="batches before them")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--attention-backend", choices=BACKENDS, default="auto", help="of the paged side")
    add("--seed", type=at_least_zero, default=0)
    add("--plot", type=file_to_write, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    if options.plot and not has_matplotlib():
        parser.error("--plot needs matplotlib; install jpaged[plot]")
    return options


def _engine(options: argparse.Namespace) -> LLM:
    longest = options.input_len + options.output_len
    return LLM(
        options.model,
        dtype=options.dtype,
        block_size=options.block_size,
        num_blocks=options.batch_size * -(-longest // options.block_size) + 1,
        max_num_seqs=options.batch_size,
        max_model_len=longest,
        enable_prefix_caching=False,
        attention_backend=options.attention_backend,
        use_tqdm=False,
    )


def _batch(options: argparse.Namespace, *, vocab_size: int) -> list[Arrival]:
    pair = RequestLengths(input_tokens=options.input_len, output_tokens=options.output_len)
    prompts = random_prompts([pair] * options.batch_size, vocab_size=vocab_size, seed=options.seed)
    return [Arrival(seconds=0.0, prompt=p, max_tokens=options.output_len) for p in prompts]


def _report(
    options: argparse.Namespace, served: dict[str, list[Served]], timings: dict[str, Timing]
) -> dict:
    sides = {}
    for name, timing in timings.items():
        # Each request's own E2EL gives way to the batch's, which is what vLLM's benchmark times.
        sides[name] = {
            **token_metrics(served[name]),
            **summary("e2el", timing.seconds),
            "seconds": [round(second, 3) for second in timing.seconds],
            "others_share": timing.others_share,
        }
    ratios = {
        kind: sides["paged"][f"median_{kind}_ms"] / sides["unpaged"][f"median_{kind}_ms"]
        for kind in ("e2el", "ttft", "tpot")
        if sides["unpaged"][f"median_{kind}_ms"]
    }
    return {
        "benchmark": "latency",
        "batch_size": options.batch_size,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "num_iters": options.num_iters,
        "dtype": options.dtype,
        "sides": sides,
        "paged_of_unpaged": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
    }


def _print_table(report: dict) -> None:
    print(
        f"{report['batch_size']} requests at once, {report['input_len']} prompt tokens and "
        f"{report['output_len']} output tokens each, {report['num_iters']} batches, "
        f"{report['dtype']}"
    )
    print(f"{'ms':16} {'mean':>10} {'median':>10} {'p99':>10}   paged takes, of the median")
    for kind in ("e2el", "ttft", "tpot"):
        for name, side in report["sides"].items():
            figures = [side[f"{which}_{kind}_ms"] for which in ("mean", "median", "p99")]
            if None in figures:
                continue  # an answer of one token has no TPOT
            share = f"{report['paged_of_unpaged'][kind]:8.2f}" if name == "paged" else ""
            print(
                f"{f'{kind} {name}':16} "
                + " ".join(f"{figure:10.1f}" for figure in figures)
                + share
            )
    shares = {name: side["others_share"] for name, side in report["sides"].items()}
    print(f"share of the machine that others used: {shares}")
    print(f"compiles after warm-up: {report['compiles_after_warm_up']}")


if __name__ == "__main__":
    main()
