"""Long prompts: how prefill and decode slow down as the context grows, and memory does not.

python -m benchmarks.long_context [--contexts 1024 8192 32768 131072] [--output-len 16]

A small Llama of random weights (two layers, 2 query heads and 1 KV head of size 64: 1 KiB of K and
V a token in float32) is served by an `LLM` of its own for each context, whose tables and pool hold
it. A prompt of random tokens is prefilled in chunks of --max-num-batched-tokens, until its first
token is told; then --output-len more are decoded, and ms are the median of theirs. Prefill is timed
once, since a long one is hundreds of steps. Temporaries are what the compiled steps need beside
weights, pool and state: the most of any of them, by XLA's analysis. Of a context they should hold
no more than a row of a table. Beside them stands what the scores of one chunk in one layer would
take as a matrix.

The default contexts take three and a half minutes of processor time: two minutes on two idle cores.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from benchmarks.arguments import (
    BACKENDS,
    BLOCK_SIZES,
    at_least_one,
    at_least_zero,
    file_to_write,
)
from benchmarks.lengths import RequestLengths, random_prompts
from benchmarks.measure import CompileLog, block_nbytes, provenance
from benchmarks.others import OthersShare
from benchmarks.plot import has_matplotlib
from benchmarks.plot_long_context import draw
from benchmarks.random_checkpoint import LONG, write_checkpoint
from jpaged import LLM, SamplingParams
from pallas_kernels import choose_backend

CONTEXTS = [1024, 8192, 32768, 131072]


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    compiles = CompileLog()
    backend = choose_backend(options.attention_backend, jax.devices()[0].platform)
    results = []
    print(
        f"{'context':>8} {'prefill s':>10} {'tokens/s':>9} {'decode ms':>10} "
        f"{'temporaries MB':>15} {'scores MB':>10} {'KV MB':>8} {'others':>7}"
    )
    for context in options.contexts:
        with tempfile.TemporaryDirectory() as folder, _engine(options, context, folder) as llm:
            # Whatever runs for the first time.
            _serve(llm, min(context, options.max_num_batched_tokens), options)
            compiles.events.clear()
            results.append(_result(llm, context, options))
            assert not compiles.events, "a program was compiled while it was timed"
        print(_line(results[-1]), flush=True)
    report = {
        "benchmark": "long_context",
        "dtype": options.dtype,
        "attention": backend.value,
        "block_size": options.block_size,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "output_len": options.output_len,
        "model": LONG,
        "results": results,
    }
    print(json.dumps({**report, **provenance()}), flush=True)
    if options.plot:
        draw(report, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--contexts", type=at_least_one, nargs="+", default=CONTEXTS, help="tokens of each prompt")
    add("--output-len", type=at_least_one, default=16, help="tokens decoded after the first")
    add("--max-num-batched-tokens", type=at_least_one, default=256, help="of a chunk")
    add("--dtype", default="float32", help="of the weights")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--attention-backend", choices=BACKENDS, default="auto")
    add("--seed", type=at_least_zero, default=0)
    add("--plot", type=file_to_write, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    if options.plot and not has_matplotlib():
        parser.error("--plot needs matplotlib; install jpaged[plot]")
    return options


def _engine(options: argparse.Namespace, context: int, folder: str) -> LLM:
    """One row, in a pool and a table that hold this context and what follows it."""
    longest = context + 1 + options.output_len
    config = LONG | {"max_position_embeddings": longest}
    return LLM(
        write_checkpoint(pathlib.Path(folder, "model"), config, seed=options.seed),
        dtype=options.dtype,
        block_size=options.block_size,
        num_blocks=-(-longest // options.block_size) + 1,
        max_num_seqs=1,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=longest,
        enable_prefix_caching=False,  # a context is not to begin with the one before it
        attention_backend=options.attention_backend,
        use_tqdm=False,
    )


def _serve(llm: LLM, context: int, options: argparse.Namespace) -> list[float]:
    """Seconds from the prompt to each of its tokens."""
    pair = RequestLengths(input_tokens=context, output_tokens=1 + options.output_len)
    (prompt,) = random_prompts([pair], vocab_size=LONG["vocab_size"], seed=options.seed)
    params = SamplingParams(
        temperature=0, max_tokens=pair.output_tokens, ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in llm.stream(prompt, params)]
    assert len(times) == pair.output_tokens, "every token is told as it comes"
    return times


def _result(llm: LLM, context: int, options: argparse.Namespace) -> dict:
    load = OthersShare()
    times = _serve(llm, context, options)
    others_share = load.now()
    prefill, *_ = times
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    print(f"{context} tokens: {times[-1]:.2f} s", file=sys.stderr)
    chunk = min(context, options.max_num_batched_tokens)
    return {
        "context": context,
        "prefill_s": round(prefill, 4),
        "prefill_tokens_per_s": round(context / prefill, 1),
        "decode_ms": round(statistics.median(gaps) * 1e3, 3),
        "temporary_bytes": _temporary_bytes(llm),
        "scores_bytes": LONG["num_attention_heads"] * chunk * context * 4,
        "kv_bytes": context * block_nbytes(llm) // options.block_size,
        "others_share": others_share,
    }


def _temporary_bytes(llm: LLM) -> int:
    """The most that any program of the engine needs beside its arguments and results."""
    most = 0
    for program in llm.engine.runner.programs.values():
        analysis = program.memory_analysis()
        assert analysis is not None, "every device that knows its memory analyses its programs"
        most = max(most, analysis.temp_size_in_bytes)
    return most


def _line(result: dict) -> str:
    share = result["others_share"]
    return (
        f"{result['context']:8} {result['prefill_s']:10.2f} "
        f"{result['prefill_tokens_per_s']:9.0f} {result['decode_ms']:10.2f} "
        f"{result['temporary_bytes'] / 1e6:15.2f} {result['scores_bytes'] / 1e6:10.2f} "
        f"{result['kv_bytes'] / 1e6:8.2f} " + (7 * " " if share is None else f"{share:7.0%}")
    )


if __name__ == "__main__":
    main()
