"""The command line of the serving benchmark."""

import argparse

from benchmarks.arguments import (
    BACKENDS,
    BLOCK_SIZES,
    above_zero,
    at_least_one,
    at_least_zero,
    cache_dtype,
    existing_file,
    file_to_write,
)
from benchmarks.lengths import LAWS
from benchmarks.plot import has_matplotlib
from benchmarks.serving_sides import UNPAGED, equal_blocks

# The Azure trace's prompts are of 1,155 tokens on average, its answers of 211. Two cores compute
# about a thousand tokens of a prompt in a second, so that its own lengths would keep a model of 135
# million parameters busy with prompts alone.
AZURE_SCALE = 0.25


def parse_options(description: str | None) -> argparse.Namespace:
    """The checked options, each with a value; what cannot be run is refused here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_sim",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_requests(parser)
    _add_rates(parser)
    _add_sides(parser)
    options = parser.parse_args()
    if options.length_scale is None:
        options.length_scale = 1.0 if options.lengths else AZURE_SCALE
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def lengths_source(text: str) -> str:
    """The name of a law of lengths, or the path of a file that is there."""
    if text in LAWS:
        return text
    try:
        return existing_file(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a file that exists or one of {', '.join(LAWS)}, got {text!r}"
        ) from None


def _add_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    add(
        "--trace",
        type=existing_file,
        help="CSV with arrival_s, input_tokens and output_tokens, or Mooncake's .jsonl; by default "
        "gaps and lengths are drawn after the Azure conversation trace of 2023",
    )
    add("--first", type=at_least_zero, default=0, help="requests of the trace that are passed over")
    add("--requests", type=at_least_one, default=48, help="requests of each run")
    add(
        "--lengths",
        type=lengths_source,
        help="other lengths for the same arrivals: a file with input_tokens and output_tokens, or "
        "a law: " + ", ".join(LAWS),
    )
    add(
        "--length-scale",
        type=above_zero,
        help=f"all lengths are multiplied with it; {AZURE_SCALE}, or 1 with --lengths",
    )
    add("--max-input", type=at_least_one, default=512, help="longer prompts are then clipped")
    add("--max-output", type=at_least_one, default=256, help="longer answers are then clipped")
    add(
        "--shared-prefix",
        type=at_least_zero,
        default=0,
        help="tokens that all prompts begin with; above 0 the engine's prefix cache is on",
    )
    add("--seed", type=int, default=0)


def _add_rates(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rates and the objective").add_argument
    add(
        "--rates",
        type=above_zero,
        nargs="+",
        default=[0.25, 0.5, 1.0],
        help="requests a second on average: the trace's clock is scaled to each, for every side",
    )
    add(
        "--search",
        action="store_true",
        help="then find the highest rate within the objective: double or halve, and bisect",
    )
    add("--bisections", type=at_least_one, default=3, help="of the search, for each side")
    add(
        "--ttft-ms",
        type=above_zero,
        default=5000.0,
        help="objective: 99 %% of first tokens come within it",
    )
    add(
        "--itl-ms",
        type=above_zero,
        default=1000.0,
        help="objective: 99 %% of the other tokens follow the one before within it",
    )
    add("--plot", type=file_to_write, help="PNG to draw: TTFT and goodput; needs matplotlib")


def _add_sides(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sides").add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", type=cache_dtype, default="float32", help="of weights and cache, on every side")
    add(
        "--rows",
        type=at_least_one,
        default=4,
        help="baseline rows: they fix the bytes of every side",
    )
    add("--reserved", type=at_least_one, default=2048, help="tokens that a baseline row reserves")
    add(
        "--unpaged",
        choices=list(UNPAGED),
        nargs="+",
        default=["unpaged"],
        help="baselines: static batches; the same with rows that reserve only what these requests "
        "can need at most; and rows of the first kind that are refilled one by one",
    )
    add("--max-num-seqs", type=at_least_one, default=64, help="sequences the engine runs at once")
    add("--max-num-batched-tokens", type=at_least_one, help="tokens of a step of the engine")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add("--attention-backend", choices=BACKENDS, default="auto", help="of the engine")


def _check(options: argparse.Namespace) -> None:
    if options.requests < 2:
        raise ValueError("--requests must be at least 2: one request has no rate")
    longest = options.max_input + options.max_output
    if longest > options.reserved:
        raise ValueError(
            f"--reserved {options.reserved} must hold --max-input and --max-output together, "
            f"{longest} tokens"
        )
    if options.first and not options.trace:
        raise ValueError("--first passes over requests of a trace; give --trace")
    equal_blocks(options.rows, options.reserved, options.block_size)
    if options.plot and not has_matplotlib():
        raise ValueError("--plot needs matplotlib; install jpaged[plot]")
