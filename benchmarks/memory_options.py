"""The memory benchmark's command line and traces: whatever is bad is refused before a part runs."""

import argparse
import dataclasses
import pathlib

from benchmarks.arguments import (
    BLOCK_SIZES,
    above_zero,
    at_least_one,
    beam_width,
    existing_file,
    file_to_write,
)
from benchmarks.lengths import LAWS, RequestLengths, is_mooncake, law_lengths, read_trace
from benchmarks.order import Arrival, shared_prompts, trace_prompts
from benchmarks.replay import Prompt, read_prompts
from jpaged.beams import MAX_BEAM_WIDTH

PARTS = ("waste", "sharing", "beams", "hits", "order", "cost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the chosen parts run on, each with the name of its trace or law."""

    lengths: list[tuple[str, list[RequestLengths]]]  # for waste, sharing and beams
    prompts: list[tuple[str, list[Prompt]]]  # for hits
    arrivals: list[tuple[str, list[Arrival]]]  # for order


def parse_command(description: str | None) -> tuple[argparse.Namespace, Inputs]:
    """The options and what they name; a bad one ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    _add_sharing(parser)
    _add_beams(parser)
    _add_hits(parser)
    _add_order(parser)
    _add_cost(parser)
    options = parser.parse_args()
    try:
        options.parts = _parts(options)
        return options, _read(options)
    except ValueError as error:
        parser.error(str(error))


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--trace",
        type=existing_file,
        nargs="+",
        default=[],
        help="CSV files with the columns input_tokens and output_tokens, or Mooncake's .jsonl; by "
        "default lengths are drawn from the laws",
    )
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="what is measured; by default everything, but hits only with a Mooncake trace",
    )
    add(
        "--requests",
        type=at_least_one,
        default=20_000,
        help="requests of each trace at most, or drawn from each law",
    )
    add(
        "--slabs",
        type=at_least_one,
        default=32,
        help="the pool holds the tokens of so many longest requests",
    )
    add("--block-size", type=int, choices=BLOCK_SIZES, default=16, help="tokens in a block")
    add("--seed", type=int, default=0, help="seed of all that is drawn at random")
    add("--plot", type=file_to_write, help="PNG to draw of the part waste; needs matplotlib")


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sharing (several answers to each prompt)").add_argument
    add(
        "--sharing-requests",
        type=at_least_one,
        default=1_000,
        help="requests of this part: the first of each trace or law",
    )
    add(
        "--parallel",
        type=at_least_one,
        nargs="+",
        default=[2, 4, 6],
        help="answers to each prompt; one run for each of these numbers",
    )


def _add_beams(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("beams (beam searches)").add_argument
    add(
        "--beam-requests",
        type=at_least_one,
        default=200,
        help="searches of this part: for the first requests of each trace or law",
    )
    add(
        "--beam-widths",
        type=beam_width,
        nargs="+",
        default=[2, 4, 6],
        help=f"beams of each search, at most {MAX_BEAM_WIDTH}; one run for each of these numbers",
    )
    add(
        "--model",
        nargs="?",
        const="",
        help="also run the beams of this model (directory, .gguf file or hub id; without a value "
        "the default model) over the bundled questions",
    )
    add(
        "--model-tokens",
        type=at_least_one,
        default=128,
        help="tokens of each of the model's answers, at most",
    )


def _add_hits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("hits (prefix hits of a Mooncake trace)").add_argument
    add(
        "--hit-block-size",
        type=int,
        choices=BLOCK_SIZES,
        default=128,
        help="tokens in a block of this part",
    )
    add(
        "--hit-blocks",
        type=at_least_one,
        nargs="+",
        default=[1_000, 4_000, 16_000, 64_000],
        help="usable blocks of the pools that a Mooncake trace is replayed with",
    )


def _add_order(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "order (first come first served against cache-aware admission)"
    ).add_argument
    add(
        "--order-requests",
        type=at_least_one,
        default=2_000,
        help="requests of this part: of each Mooncake trace at most, or drawn from each law",
    )
    add(
        "--order-slots",
        type=at_least_one,
        default=48_000,
        help="tokens that the pool of this part holds, or more: two longest requests always fit",
    )
    add(
        "--load",
        type=above_zero,
        nargs="+",
        default=[0.9, 1.1],
        help="how fast requests come: at 1, as fast as they are answered when all come at once; "
        "one run for each of these numbers",
    )


def _add_cost(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cost (time of the host)").add_argument
    add("--repeats", type=at_least_one, default=50, help="runs behind each median")


def _parts(options: argparse.Namespace) -> tuple[str, ...]:
    """The chosen parts, or all that the traces allow."""
    replayable = any(is_mooncake(path) for path in options.trace)
    parts = options.parts or PARTS
    if options.plot and "waste" not in parts:
        raise ValueError(f"--plot draws the part waste, got --parts {' '.join(parts)}")
    if "hits" not in parts or replayable:
        return tuple(parts)
    expected = "the part hits replays a Mooncake trace, a file that ends in .jsonl"
    if options.parts:
        raise ValueError(f"{expected}; got {' '.join(options.trace) or 'no --trace'}")
    print(f"hits is left out: {expected}, and --trace names none")
    return tuple(part for part in parts if part != "hits")


def _read(options: argparse.Namespace) -> Inputs:
    """The traces, or draws of the laws, as far as the chosen parts need them."""
    parts, num_requests, seed = set(options.parts), options.requests, options.seed
    mooncake = [path for path in options.trace if is_mooncake(path)]
    inputs = Inputs(lengths=[], prompts=[], arrivals=[])
    if parts & {"waste", "sharing", "beams"}:
        for path in options.trace:
            inputs.lengths.append((_name(path), read_trace(path)[:num_requests]))
        for law in () if options.trace else LAWS:
            lengths = law_lengths(law, num_requests, seed=seed)
            inputs.lengths.append((f"{law} law, seed {seed}", lengths))
    if "hits" in parts:
        inputs.prompts.extend((path, read_prompts(path, num_requests)) for path in mooncake)
    if "order" in parts:
        for path in mooncake:
            prompts = read_prompts(path, options.order_requests)
            inputs.arrivals.append((_name(path), trace_prompts(prompts)))
        for law in () if mooncake else LAWS:
            arrivals = shared_prompts(law, options.order_requests, seed=seed)
            inputs.arrivals.append((f"{law} law, seed {seed}", arrivals))
    return inputs


def _name(path: str) -> str:
    return pathlib.Path(path).name
