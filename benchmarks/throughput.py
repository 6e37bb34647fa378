"""Throughput of the paged engine and of the unpaged baseline on the same requests.

python -m benchmarks.throughput [--trace lengths.csv]

Both sides hold the same bytes of keys and values: those of --rows baseline rows that reserve
--max-model-len tokens each. Prompts are random tokens, lengths of answers are forced, decoding is
greedy. Beside the main ratio stands the one against rows that reserve only what these requests can
need at most, and each side's ceiling: the same run with all the memory it could use. The baseline
is plain jax.numpy, so an engine whose attention is not also runs with that of `xla`: what is left
of the ratio then is paging's own.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable

from jaxtyping import DTypeLike

from benchmarks import baseline_model
from benchmarks.arguments import at_least_one, cache_dtype, existing_file
from benchmarks.baseline import Baseline
from benchmarks.lengths import clipped_lengths, random_prompts
from benchmarks.measure import CompileLog, Timing, block_nbytes, interleaved, provenance
from jpaged import LLM, SamplingParams
from jpaged_models import NamedTensors, open_named_tensors
from pallas_kernels import Backend, default_backend

Outputs = list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """What both sides are asked."""

    prompts: list[list[int]]
    max_tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One configuration that is measured."""

    name: str
    cache_bytes: int
    cache_dtype: DTypeLike
    attention: str
    rows: int  # the most sequences that run at once
    generate: Callable[[Requests], Outputs]


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    compiles = CompileLog()
    checkpoint = open_named_tensors(options.model)
    requests = _requests(options, checkpoint.config.vocab_size)
    sides = _paged_sides(options)
    sides += _unpaged_sides(options, checkpoint, sides[0].cache_dtype)
    by_name = {side.name: side for side in sides}
    held = [by_name[name].cache_bytes for name in ("paged", "unpaged")]
    assert held[0] == held[1], f"both sides must hold the same bytes, they hold {held}"
    few = Requests(prompts=requests.prompts[:4], max_tokens=[2] * len(requests.prompts[:4]))
    for side in sides:
        side.generate(few)  # every program was compiled when the side was made
    compiles.events.clear()
    answers: dict[str, Outputs] = {}

    def run(side: Side) -> None:
        answers[side.name] = side.generate(requests)
        found = [len(tokens) for tokens in answers[side.name]]
        assert found == requests.max_tokens, f"{side.name} ended a request early"

    runs = {side.name: functools.partial(run, side) for side in sides}
    report = _report(options, requests, sides, interleaved(runs, repeats=options.repeats))
    report["same_tokens"] = _agreement(answers)
    report["compiles_after_warm_up"] = len(compiles.events)
    _print_table(report)
    print(json.dumps({**report, "model": checkpoint.source, **provenance()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", type=cache_dtype, default="float32", help="of weights and cache, on both sides")
    add("--requests", type=at_least_one, default=64)
    add(
        "--trace",
        type=existing_file,
        help="CSV with input_tokens, output_tokens; by default ShareGPT's law",
    )
    add("--max-input", type=at_least_one, default=512, help="longer prompts are clipped")
    add("--max-output", type=at_least_one, default=256, help="longer answers are clipped")
    add("--max-model-len", type=at_least_one, default=2048, help="what a baseline row reserves")
    add(
        "--rows",
        type=at_least_one,
        default=4,
        help="baseline rows: they fix the bytes of both sides",
    )
    add(
        "--max-num-seqs",
        type=at_least_one,
        default=64,
        help="sequences the engine runs at most at once",
    )
    add("--block-size", type=at_least_one, default=16)
    add("--repeats", type=at_least_one, default=5)
    add("--seed", type=int, default=0)
    add("--no-ceilings", action="store_true", help="leave out the runs with unlimited memory")
    return parser.parse_args()


def _requests(options: argparse.Namespace, vocab_size: int) -> Requests:
    lengths = clipped_lengths(
        options.trace,
        options.requests,
        seed=options.seed,
        max_input=options.max_input,
        max_output=options.max_output,
    )
    return Requests(
        prompts=random_prompts(lengths, vocab_size=vocab_size, seed=options.seed),
        max_tokens=[pair.output_tokens for pair in lengths],
    )


def _paged_sides(options: argparse.Namespace) -> list[Side]:
    """The engine with as many blocks as the baseline's bytes buy, and with blocks for everyone."""
    longest = options.max_input + options.max_output
    equal = options.rows * options.max_model_len // options.block_size
    best = default_backend()
    shapes = {"paged": (equal, best)}
    if best is not Backend.XLA:
        shapes["paged xla"] = (equal, Backend.XLA)
    if not options.no_ceilings:
        enough = options.max_num_seqs * -(-longest // options.block_size)
        shapes["paged ceiling"] = (enough, best)
    sides = []
    for name, (num_usable, backend) in shapes.items():
        print(f"warming up {name}: {num_usable} blocks of {options.block_size}", file=sys.stderr)
        llm = LLM(
            options.model,
            dtype=options.dtype,
            block_size=options.block_size,
            num_blocks=num_usable + 1,  # the null block holds nothing
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            attention_backend=backend.value,
        )

        def generate(requests: Requests, llm: LLM = llm) -> Outputs:
            params = [
                SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, detokenize=False)
                for limit in requests.max_tokens
            ]
            assert llm.reset_prefix_cache(), "an earlier round left its prompts"
            outputs = llm.generate(requests.prompts, params)
            return [list(output.outputs[0].token_ids) for output in outputs]

        sides.append(
            Side(
                name=name,
                rows=options.max_num_seqs,
                cache_bytes=num_usable * block_nbytes(llm),
                cache_dtype=llm.engine.runner.pool[0].dtype,
                attention=backend.value,
                generate=generate,
            )
        )
    return sides


def _unpaged_sides(
    options: argparse.Namespace, checkpoint: NamedTensors, cache_dtype: DTypeLike
) -> list[Side]:
    """Baselines of equal bytes with either reservation, and one with a row for every request."""
    params = baseline_model.load_params(checkpoint, dtype=options.dtype)
    longest = options.max_input + options.max_output
    num_tokens = options.rows * options.max_model_len
    shapes = {
        "unpaged": (options.rows, options.max_model_len),
        "unpaged tight": (max(1, num_tokens // longest), longest),
    }
    if not options.no_ceilings:
        shapes["unpaged ceiling"] = (options.requests, longest)
    sides = []
    for name, (num_rows, reserved) in shapes.items():
        baseline = Baseline(
            checkpoint.config,
            params,
            num_rows=num_rows,
            reserved=reserved,
            cache_dtype=cache_dtype,
        )
        print(f"warming up {name}: {num_rows} rows of {reserved} tokens", file=sys.stderr)
        baseline.warm_up(options.max_input)

        def generate(requests: Requests, baseline: Baseline = baseline) -> Outputs:
            return baseline.generate(requests.prompts, requests.max_tokens, ignore_eos=True)

        sides.append(
            Side(
                name=name,
                rows=num_rows,
                cache_bytes=baseline.cache_bytes,
                cache_dtype=cache_dtype,
                attention="jax.numpy",
                generate=generate,
            )
        )
    return sides


def _report(
    options: argparse.Namespace,
    requests: Requests,
    sides: list[Side],
    timings: dict[str, Timing],
) -> dict:
    num_tokens = sum(requests.max_tokens)
    rates = {name: num_tokens / timing.median for name, timing in timings.items()}
    ratios = {
        name: round(rates["paged"] / rate, 2) for name, rate in rates.items() if name != "paged"
    }
    ceilings = {name: rates.get(f"{name.split()[0]} ceiling") for name in rates}
    return {
        "benchmark": "throughput",
        "requests": len(requests.prompts),
        "prompt_tokens": sum(map(len, requests.prompts)),
        "output_tokens": num_tokens,
        "lengths": options.trace or f"ShareGPT's law, seed {options.seed}",
        "dtype": options.dtype,
        "sides": {
            side.name: {
                "rows": side.rows,
                "attention": side.attention,
                "cache_mib": round(side.cache_bytes / 2**20, 1),
                "tokens_per_s": round(rates[side.name], 1),
                "seconds": [round(second, 2) for second in timings[side.name].seconds],
                "others_share": timings[side.name].others_share,
            }
            for side in sides
        },
        "paged_over": ratios,
        "of_own_ceiling": {n: round(rates[n] / c, 3) for n, c in ceilings.items() if c},
    }


def _agreement(answers: dict[str, Outputs]) -> dict[str, float]:
    """The share of requests in which each side's tokens are the engine's, all of them."""
    mine = answers["paged"]
    return {
        name: statistics.fmean(a == b for a, b in zip(mine, outputs, strict=True))
        for name, outputs in answers.items()
        if name != "paged"
    }


def _print_table(report: dict) -> None:
    print(
        f"{report['requests']} requests, {report['prompt_tokens']} prompt tokens, "
        f"{report['output_tokens']} output tokens, {report['lengths']}, {report['dtype']}"
    )
    print(
        f"{'':16} {'attention':>10} {'rows':>5} {'KV MiB':>8} {'tokens/s':>9} {'of ceiling':>11} "
        f"{'paged is':>9} {'same text':>10}"
    )
    for name, side in report["sides"].items():
        share = report["of_own_ceiling"].get(name)
        ratio = report["paged_over"].get(name)
        print(
            f"{name:16} {side['attention']:>10} {side['rows']:5} {side['cache_mib']:8.1f} "
            + f"{side['tokens_per_s']:9.1f} "
            + (f"{share:11.0%} " if share else " " * 12)
            + (f"{ratio:8.2f}x {report['same_tokens'][name]:10.3f}" if ratio else "")
        )
    print(f"compiles after warm-up: {report['compiles_after_warm_up']}")


if __name__ == "__main__":
    main()
