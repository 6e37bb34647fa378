"""Where key/value memory goes under paging and under reservation, and what paging costs the host.

python -m benchmarks.memory [--trace FILE ...] [--plot FILE.png] [--model [MODEL]]

No device and, without --model, no model: the engine's own scheduler runs requests whose lengths are
a trace's, or drawn from laws fitted to real traces, in a pool that is always full. A step is a unit
of time; it computes whole prompts, or one token of each sequence that runs. The pool holds as many
tokens as --slabs of the longest request. Averages leave out the beginning, in which all requests
are young, and the end, in which none waits. Shared tokens count once, and blocks nobody refers to
are free. The picture adds a replay with shared prompts in a small pool: its blocks, its tables, its
steps.

The part named beams has as many searches as --beam-requests, whose beams follow a seeded law
(benchmarks.beam_saving); with --model it also runs a model's own beams over bundled questions.
The part named order is another run: requests come over time and begin alike (benchmarks.order).
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from benchmarks.beam_saving import BeamSaving, save_beams, save_model_beams
from benchmarks.contiguous import Buddies, FirstFit, Shares, Slabs, reserve
from benchmarks.host_cost import HostCost, host_cost
from benchmarks.lengths import RequestLengths
from benchmarks.measure import host_provenance
from benchmarks.memory_options import parse_command
from benchmarks.moment import replay_moment
from benchmarks.order import CLASSES, Arrival, compare_orders
from benchmarks.plot import draw, has_matplotlib
from benchmarks.replay import Hits, Prompt, replay
from benchmarks.saturate import Saturated, Saving, saturate, save
from jpaged import LLM

PAPER = {"maximum": 0.204, "power of 2": 0.268, "oracle": 0.382, "blocks": 0.963}  # effective
PAPER_BEAMS = "44.3 to 66.3 %"  # saved by 2 to 6 beams of OPT-13B on ShareGPT (figure 15)
BARS = {
    "waste": "within 5 % of theory",
    "running": "at least 97 % of reservation / mean resident tokens",
    "sharing": "within 1 point of theory",
    "hits": "within 2 points of an ideal LRU",
    "schedule_ms": 0.5,
    "queue": "10,000 waiting requests change schedule() by less than 10 %",
    "pairs_per_s": 3e6,
    "hash_ms": 10,
}


def main() -> None:
    """Prints tables for people and, last, one JSON line."""
    options, inputs = parse_command(__doc__)
    figures = {
        "reports": [_report(name, lengths, options) for name, lengths in inputs.lengths],
        "model_beams": [] if options.model is None else _model_beams(options),
        "hits": [hits for trace in inputs.prompts for hits in _hits(*trace, options)],
        "orders": [_order(name, arrivals, options) for name, arrivals in inputs.arrivals],
        "cost": _cost(options) if "cost" in options.parts else None,
    }
    # Before the picture, which may fail: the figures took minutes.
    report = {"benchmark": "memory", "bars": BARS, **figures, **host_provenance()}
    print(json.dumps(report), flush=True)
    if options.plot:
        _plot(figures["reports"], inputs.lengths[0][1], options)


def _report(name: str, lengths: list[RequestLengths], options: argparse.Namespace) -> dict:
    """What the parts waste, sharing and beams say of one trace or law."""
    longest = max(pair.input_tokens + pair.output_tokens for pair in lengths)
    num_slots = options.slabs * longest // options.block_size * options.block_size
    print(
        f"\n{name}: {len(lengths)} requests, the longest {longest} tokens (input + output); "
        f"a pool of {num_slots} tokens",
        flush=True,
    )
    report: dict = {"lengths": name, "requests": len(lengths)}
    report |= {"longest": longest, "pool_tokens": num_slots}
    if "waste" in options.parts:
        report |= _waste(lengths, options, num_slots=num_slots, longest=longest)
    if "sharing" in options.parts:
        report |= _sharing(lengths[: options.sharing_requests], options, num_slots=num_slots)
    if "beams" in options.parts:
        report |= _beams(lengths[: options.beam_requests], options, num_slots=num_slots)
    return report


def _waste(
    lengths: list[RequestLengths], options: argparse.Namespace, *, num_slots: int, longest: int
) -> dict:
    paged = saturate(lengths, num_slots=num_slots, block_size=options.block_size)
    shares = {
        "maximum": reserve(lengths, Slabs(num_slots, longest), num_slots=num_slots),
        "power of 2": reserve(lengths, Buddies(num_slots), num_slots=num_slots),
        "oracle": reserve(lengths, FirstFit(num_slots), num_slots=num_slots),
        "blocks": paged.shares,
    }
    at_once = paged.shares.running / shares["maximum"].running
    ideal = longest / paged.resident_tokens
    _print_shares(shares)
    lost = 1 - shares["maximum"].effective
    print(
        f"  maximum reservation wastes {lost:.1%} (the paper: 60 to 80 %)\n"
        f"  waste {paged.waste:.3%}, theory {paged.theory:.3%} at {paged.resident_tokens:.0f} "
        f"resident tokens{_verdict(abs(paged.waste / paged.theory - 1) <= 0.05)}; "
        f"{paged.steps} steps, {paged.preemptions} preemptions\n"
        f"  at once {at_once:.2f}x maximum reservation, ideal {ideal:.2f}x: "
        f"{at_once / ideal:.1%}{_verdict(at_once >= 0.97 * ideal)}",
        flush=True,
    )
    return _as_report(paged) | {
        "shares": {name: dataclasses.asdict(share) for name, share in shares.items()},
        "maximum_wastes": lost,
        "at_once": at_once,
        "at_once_ideal": ideal,
        "at_once_of_ideal": at_once / ideal,
    }


def _as_report(paged: Saturated) -> dict:
    return {
        "waste": paged.waste,
        "waste_theory": paged.theory,
        "resident_tokens": paged.resident_tokens,
        "preemptions": paged.preemptions,
        "steps": paged.steps,
    }


def _print_shares(shares: dict[str, Shares]) -> None:
    print(
        f"  {'':12} {'effective':>10} {'reserved':>9} {'internal':>9} {'external':>9} "
        f"{'running':>8} {'paper, effective':>17}"
    )
    for name, share in shares.items():
        print(
            f"  {name:12} {share.effective:10.1%} {share.reserved:9.1%} {share.internal:9.1%} "
            f"{share.external:9.1%} {share.running:8.1f} {PAPER[name]:17.1%}"
        )


def _sharing(lengths: list[RequestLengths], options: argparse.Namespace, *, num_slots: int) -> dict:
    savings: list[Saving] = []
    for n in options.parallel:
        saving = save(lengths, n, num_slots=num_slots, block_size=options.block_size)
        savings.append(saving)
        print(
            f"  n={n} saves {saving.measured:.1%} of blocks, theory {saving.theory:.1%}"
            f"{_verdict(abs(saving.measured - saving.theory) <= 0.01)}; "
            f"{saving.copied_blocks} blocks copied, {saving.preemptions} preemptions",
            flush=True,
        )
    return {"sharing": [dataclasses.asdict(saving) for saving in savings]}


def _beams(lengths: list[RequestLengths], options: argparse.Namespace, *, num_slots: int) -> dict:
    size, seed = options.block_size, options.seed
    savings = []
    for width in options.beam_widths:
        savings.append(save_beams(lengths, width, num_slots=num_slots, block_size=size, seed=seed))
        _print_beams(savings[-1])
    return {"beams": [dataclasses.asdict(saving) for saving in savings]}


def _model_beams(options: argparse.Namespace) -> list[dict]:
    savings = []
    with LLM(options.model or None, block_size=options.block_size, warm_up=False) as llm:
        print(f"\nbeams of {llm.model_source}, at most {options.model_tokens} tokens")
        for width in options.beam_widths:
            savings.append(save_model_beams(llm, width, num_tokens=options.model_tokens))
            _print_beams(savings[-1])
    return [dataclasses.asdict(saving) for saving in savings]


def _print_beams(saving: BeamSaving) -> None:
    print(
        f"  {saving.beam_width} beams save {saving.measured:.1%} of blocks (the paper: "
        f"{PAPER_BEAMS}); {saving.survivors:.0%} of beams go on from a step; "
        f"{saving.copied_blocks} blocks copied, {saving.preemptions} preemptions",
        flush=True,
    )


def _hits(path: str, prompts: list[Prompt], options: argparse.Namespace) -> list[dict]:
    size = options.hit_block_size
    print(
        f"\nprefix hits of {len(prompts)} prompts of {pathlib.Path(path).name}, one after another, "
        f"one token each, blocks of {size}\n"
        f"  {'pool':>10} {'hits':>7} {'ideal LRU':>10}     {'of 512-token pieces':>20} {'ideal':>7}"
    )
    longest = -(-(1 + max(prompt.num_tokens for prompt in prompts)) // size)
    all_hits: list[Hits] = []
    for num_blocks in (*options.hit_blocks, None):
        if num_blocks is not None and num_blocks < longest:
            print(f"  {num_blocks:10} passed over: the longest prompt takes {longest} blocks")
            continue
        hits = replay(prompts, num_blocks=num_blocks, block_size=size)
        all_hits.append(hits)
        print(
            f"  {num_blocks or 'unbounded':>10} {hits.measured:7.2%} {hits.ideal:10.2%}"
            f"{_verdict(abs(hits.measured - hits.ideal) <= 0.02)} "
            f"{hits.pieces:20.2%} {hits.ideal_pieces:7.2%}",
            flush=True,
        )
    return [{"trace": path, "block_size": size} | dataclasses.asdict(hits) for hits in all_hits]


def _order(name: str, arrivals: list[Arrival], options: argparse.Namespace) -> dict:
    longest = max(arrival.num_tokens + arrival.num_outputs for arrival in arrivals)
    size = options.block_size
    num_slots = max(options.order_slots, 2 * longest) // size * size
    print(
        f"\norder: {name}: {len(arrivals)} requests, a pool of {num_slots} tokens; steps from "
        f"arrival to first token, mean / 99th percentile",
        flush=True,
    )
    steps, compared = compare_orders(arrivals, options.load, num_slots=num_slots, block_size=size)
    print(f"  {'load':>4} {'':11} {'hits':>6} {'steps':>6} {'overtaken':>9}", end="")
    print("".join(f" {name:>14}" for name in ("all", *CLASSES)))
    for one in compared:
        for order, replayed in one.orders.items():
            waits = [f"{wait.mean:.0f} / {wait.p99:.0f}" for wait in replayed.waits.values()]
            print(
                f"  {one.load:4.2f} {order:11} {replayed.hit_rate:6.1%} {replayed.steps:6} "
                f"{replayed.most_overtaken:9}{''.join(f' {wait:>14}' for wait in waits)}",
                flush=True,
            )
    report = {"requests": name, "count": len(arrivals), "pool_tokens": num_slots}
    return report | {"steps_at_once": steps, "loads": [dataclasses.asdict(c) for c in compared]}


def _cost(options: argparse.Namespace) -> dict:
    cost: HostCost = host_cost(block_size=options.block_size, repeats=options.repeats)
    worst = max(cost.schedule_queued_ms, cost.schedule_blocked_ms)
    print(
        f"\nhost, medians of {options.repeats}\n"
        f"  schedule() with 256 decodes {cost.schedule_ms:.3f} ms"
        f"{_verdict(cost.schedule_ms <= 0.5)}; commit() {cost.commit_ms:.3f} ms\n"
        f"  ahead of a step in flight {cost.schedule_ahead_ms:.3f} ms; the plan as arrays "
        f"{cost.pack_ms:.3f} ms\n"
        f"  with 10,000 waiting for rows {cost.schedule_queued_ms:.3f} ms, for blocks "
        f"{cost.schedule_blocked_ms:.3f} ms{_verdict(worst < 1.1 * cost.schedule_ms)}\n"
        f"  allocate + free {cost.pairs_per_s / 1e6:.1f} million blocks a second"
        f"{_verdict(cost.pairs_per_s >= 3e6)}\n"
        f"  hashing 100,000 tokens {cost.hash_ms:.2f} ms{_verdict(cost.hash_ms <= 10)}",
        flush=True,
    )
    return dataclasses.asdict(cost)


def _plot(reports: list[dict], lengths: list[RequestLengths], options: argparse.Namespace) -> None:
    path = options.plot
    if has_matplotlib():
        draw(reports, replay_moment(lengths, block_size=options.block_size), path)
        print(f"drawn: {path}", file=sys.stderr)  # the JSON line stays the last
    else:
        print(f"{path} is not drawn: matplotlib is missing; pip install '.[plot]'", file=sys.stderr)


def _verdict(met: bool) -> str:
    return " (met)" if met else " (MISSED)"


if __name__ == "__main__":
    main()
