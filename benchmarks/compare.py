"""jpaged beside other engines on this machine: the same requests, in turns of one run.

python -m benchmarks.compare --model FOLDER --python vllm=/opt/vllm/bin/python

Each side is a process of its own, with its own interpreter, which loads the model, warms up and
waits for its turns; a peer that is not installed is skipped, and said to be. Decoding is greedy and
answers have forced lengths. Sets of requests: `single`, one user; `workload`, 64 requests of
lognormal lengths at once; `prefix`, 64 requests with 8 shared prefixes at once; `prefix-led`, the
same, with the first of each prefix ended before the others come. `agrees` is the mean share of an
answer's tokens before the first that differs from jpaged's: two floating-point engines part sooner
or later, but one that computes something else parts at once.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Sequence

from benchmarks import workload
from benchmarks.arguments import at_least_one, at_least_zero, existing_file, file_to_write
from benchmarks.measure import provenance
from benchmarks.peers import PEERS
from benchmarks.peers.process import SideError, SideProcess
from benchmarks.peers.worker import Job
from benchmarks.plot import has_matplotlib
from benchmarks.plot_compare import draw
from jpaged_models import open_checkpoint

OURS = "jpaged"
Turns = dict[str, dict[str, list[dict]]]  # of each set, of each side


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = _options()
    try:
        sets = _sets(options)
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from None
    with contextlib.ExitStack() as stack:
        sides, skipped = _start_all(options, sets, stack)
        turns, failed = _take_turns(options, sides)
    report = _report(options, turns, {name: side.ready for name, side in sides.items()})
    report["skipped"] = {**skipped, **failed}
    _print_table(report)
    print(json.dumps({**report, **provenance()}), flush=True)
    if options.plot:
        draw(report, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder in Hugging Face's layout, for all sides; by default ours alone")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    add("--python", type=_pair, action="append", default=[], help="PEER=INTERPRETER that has it")
    add("--peer-model", type=_pair, action="append", default=[], help="PEER=its own form of it")
    add("--llama-server", help="the program; by default the one on the path")
    add("--sets", nargs="+", choices=workload.NAMES, default=list(workload.NAMES))
    add("--workload", type=existing_file, help="JSON lines: prompt_token_ids, output_len")
    add("--prefix-workload", type=existing_file, help="the same, with shared prefixes")
    add("--max-num-seqs", type=at_least_one, default=64)
    add("--repeats", type=at_least_one, default=5, help="turns of each side")
    add("--seed", type=at_least_zero, default=0, help="of requests that are drawn")
    add("--plot", type=file_to_write, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    if options.plot and not has_matplotlib():
        parser.error("--plot needs matplotlib; install jpaged[plot]")
    if options.peer_model and not options.model:
        parser.error("--peer-model needs --model: every side must have the same weights")
    options.python, options.peer_model = dict(options.python), dict(options.peer_model)
    return options


def _pair(text: str) -> tuple[str, str]:
    peer, _, value = text.partition("=")
    if peer not in PEERS or not value:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PEERS)}, = and a path, got {text!r}"
        )
    return peer, value


def _sets(options: argparse.Namespace) -> dict[str, list[list[workload.Request]]]:
    vocab_size = open_checkpoint(options.model).config.vocab_size
    drawn = {"vocab_size": vocab_size, "seed": options.seed}
    requests, prefixes = options.workload, options.prefix_workload
    sets = workload.make_sets(
        workload.read_requests(requests) if requests else workload.drawn_requests(**drawn),
        workload.read_requests(prefixes) if prefixes else workload.drawn_prefixes(**drawn),
    )
    return {name: sets[name] for name in options.sets}


def _start_all(
    options: argparse.Namespace, sets: dict, stack: contextlib.ExitStack
) -> tuple[dict[str, SideProcess], dict[str, str]]:
    """The sides that are here, and why the others are not. Without ours there is no comparison."""
    sides: dict[str, SideProcess] = {}
    skipped = {peer: "not asked for" for peer in PEERS if peer not in options.peers}
    for name in (OURS, *options.peers):
        job = Job(
            model=options.peer_model.get(name, options.model) or "",
            dtype=options.dtype,
            max_num_seqs=options.max_num_seqs,
            max_model_len=workload.longest(sets),
            program=options.llama_server,
            sets=sets,
        )
        print(f"starting {name}", file=sys.stderr)
        try:
            sides[name] = SideProcess(name, options.python.get(name, sys.executable), job)
            stack.callback(sides[name].close)
        except SideError as error:
            if name == OURS:
                raise SystemExit(f"compare: jpaged: {error}") from None
            skipped[name] = str(error)
            print(f"{name} is skipped: {error}", file=sys.stderr)
    return sides, skipped


def _take_turns(
    options: argparse.Namespace, sides: dict[str, SideProcess]
) -> tuple[Turns, dict[str, str]]:
    """Every side's runs of every set; a side that fails has no further turns."""
    turns: Turns = {name: {side: [] for side in sides} for name in options.sets}
    failed: dict[str, str] = {}
    for name, turn in itertools.product(options.sets, range(options.repeats)):
        for side in _rotated(list(sides), turn):
            if side in failed:
                continue
            try:
                found = sides[side].run(name)
            except SideError as error:
                failed[side] = f"failed in {name}: {error}"
                print(f"{side}: {failed[side]}", file=sys.stderr)
                continue
            turns[name][side].append(found)
            print(
                f"{name} {turn + 1}/{options.repeats}: {side}: {found['seconds']:.2f} s",
                file=sys.stderr,
            )
    return turns, failed


def _rotated(sides: list[str], turn: int) -> list[str]:
    """Nobody always comes first, or behind the same other."""
    first = turn % len(sides)
    return sides[first:] + sides[:first]


def _report(options: argparse.Namespace, turns: Turns, ready: dict[str, dict]) -> dict:
    return {
        "benchmark": "compare",
        "dtype": options.dtype,
        "repeats": options.repeats,
        "max_num_seqs": options.max_num_seqs,
        "sides": ready,
        "sets": {
            name: {
                side: _figures(runs, by_side[OURS])
                for side, runs in by_side.items()
                if len(runs) == options.repeats  # of one that failed there is no median
            }
            for name, by_side in turns.items()
            if len(by_side[OURS]) == options.repeats
        },
    }


def _figures(runs: Sequence[dict], ours: Sequence[dict]) -> dict:
    """Throughputs of the median turn, and how ours compares: the median of the turns' ratios."""
    seconds = statistics.median(run["seconds"] for run in runs)
    answers = runs[0]["token_ids"]
    pairs = list(zip(runs, ours, strict=True))
    ratios = [run["seconds"] / own["seconds"] for run, own in pairs]
    agreements = [_agreement(run["token_ids"], own["token_ids"]) for run, own in pairs]
    shares = [run["others_share"] for run in runs if run["others_share"] is not None]
    return {
        "output_throughput": round(sum(map(len, answers)) / seconds, 2),
        "request_throughput": round(len(answers) / seconds, 4),
        "seconds": [round(run["seconds"], 3) for run in runs],
        "jpaged_of_it": round(statistics.median(ratios), 3),
        "agrees": round(min(agreements), 3),
        "others_share": max(shares) if shares else None,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _agreement(answers: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """The mean share of an answer's tokens before the first that differs."""
    shares = []
    for answer, own in zip(answers, ours, strict=True):
        pairs = zip(answer, own, strict=True)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        shares.append(same / len(own))
    return statistics.fmean(shares)


def _print_table(report: dict) -> None:
    print(f"{report['dtype']}, {report['repeats']} turns; output tokens a second")
    print(
        f"{'':12} {'':14} {'tokens/s':>9} {'jpaged/it':>10} {'agrees':>7} {'others':>7} "
        f"{'RSS GB':>7}"
    )
    for name, by_side in report["sets"].items():
        for side, found in by_side.items():
            others = found["others_share"]
            print(
                f"{name:12} {side:14} {found['output_throughput']:9.1f} "
                f"{found['jpaged_of_it']:10.2f} {found['agrees']:7.3f} "
                f"{'unknown' if others is None else format(others, '7.1%'):>7} "
                f"{found['peak_rss_bytes'] / 1e9:7.2f}"
            )
    for side, ready in report["sides"].items():
        print(
            f"{side} {ready['version']}: loaded in {ready['load_s']:.1f} s, warm in "
            f"{ready['warm_up_s']:.1f} s"
        )
    for side, reason in report["skipped"].items():
        print(f"{side}: skipped: {reason.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
