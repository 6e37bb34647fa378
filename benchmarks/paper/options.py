"""The command line of the paper's figures."""

import argparse
from collections.abc import Mapping

from benchmarks.arguments import (
    BACKENDS,
    BLOCK_SIZES,
    above_zero,
    at_least_one,
    cache_dtype,
    file_to_write,
)
from benchmarks.paper.figure import Figure
from benchmarks.plot import has_matplotlib
from benchmarks.serving_options import lengths_source
from benchmarks.serving_sides import UNPAGED, equal_blocks


def parse_options(
    description: str | None, figures: Mapping[str, Figure]
) -> dict[str, argparse.Namespace]:
    """The checked options of each figure that was asked for; what cannot be run is refused here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="+", choices=list(figures), metavar="FIGURE")
    _add_common(parser)
    _add_engine(parser)
    _add_special(parser)
    given = parser.parse_args()
    try:
        _check_used(given, figures)
        return {name: _options_of(name, figures[name], given) for name in given.figures}
    except ValueError as error:
        parser.error(str(error))


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("all figures; each has its own defaults").add_argument
    add("--requests", type=at_least_one, help="of each run")
    add("--rates", type=above_zero, nargs="+", help="requests a second on average")
    add("--repeats", type=at_least_one, help="runs behind each point, of which the middle one is")
    add("--rows", type=at_least_one, help="rows of a baseline: they fix the bytes of every side")
    add("--reserved", type=at_least_one, help="tokens that a baseline's row reserves")
    add("--max-input", type=at_least_one, help="longer prompts, or questions, are clipped")
    add("--max-output", type=at_least_one, help="longer answers are clipped")
    add("--seed", type=int, default=0)
    add("--plot", type=file_to_write, help="PNG to draw, of all figures; needs matplotlib")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and engine").add_argument
    add("--model", help="directory, .gguf file or hub id; by default the default model")
    add("--dtype", type=cache_dtype, default="float32", help="of weights and cache, on every side")
    add("--max-num-seqs", type=at_least_one, default=32, help="sequences the engine runs at once")
    add("--max-num-batched-tokens", type=at_least_one, help="tokens of a step of the engine")
    add("--attention-backend", choices=BACKENDS, default="auto", help="of the engine")


def _add_special(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("some figures").add_argument
    add("--lengths", type=lengths_source, help="a law, or a file; all but shared-prefix")
    add("--length-scale", type=above_zero, help="lengths are multiplied with it; likewise")
    add("--block-size", type=int, choices=BLOCK_SIZES, help="latency, shared-prefix, chat")
    add("--block-sizes", type=int, choices=BLOCK_SIZES, nargs="+", help="block-size, swap")
    add("--unpaged", choices=list(UNPAGED), nargs="+", help="latency: baselines")
    add("--prefixes", type=at_least_one, nargs="+", help="shared-prefix: tokens that are shared")
    add("--rounds", type=at_least_one, help="chat: questions of a session")
    add("--history", type=at_least_one, help="chat: last tokens of a conversation that are sent")
    add("--swap-space", type=above_zero, help="swap: GiB of host memory")
    parser.set_defaults(shared_prefix=0)  # of the parts that these figures share with serving_sim


def _check_used(given: argparse.Namespace, figures: Mapping[str, Figure]) -> None:
    """Refuses what would change nothing: an option of none of the figures asked for."""
    of_some = {name for figure in figures.values() for name in figure.defaults}
    of_these = {name for asked in given.figures for name in figures[asked].defaults}
    for name in sorted(of_some - of_these):
        if getattr(given, name) is not None:
            users = ", ".join(key for key, figure in figures.items() if name in figure.defaults)
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of {users}; got {' '.join(given.figures)}"
            )


def _options_of(name: str, figure: Figure, given: argparse.Namespace) -> argparse.Namespace:
    """What was given, and the figure's own defaults."""
    values = vars(given)
    own = {key: value for key, value in figure.defaults.items() if values[key] is None}
    options = argparse.Namespace(**values | own)
    if options.requests < 2:
        raise ValueError("--requests must be at least 2: one request has no rate")
    needed = figure.longest(options)
    if needed > options.reserved:
        raise ValueError(
            f"{name}: --reserved {options.reserved} must hold the longest prompt and answer "
            f"together, {needed} tokens; raise it, or lower --max-input or --max-output"
        )
    for block_size in figure.block_sizes(options):
        equal_blocks(options.rows, options.reserved, block_size)
    if options.plot and not has_matplotlib():
        raise ValueError("--plot needs matplotlib; install jpaged[plot]")
    return options
