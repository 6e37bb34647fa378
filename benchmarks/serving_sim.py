"""A trace's arrivals served in process, by the paged engine and by the unpaged baseline.

python -m benchmarks.serving_sim [--trace azure_llm_2023_conv.csv] [--search]

Open loop, on the real clock: requests come when the trace says, scaled to each of --rates, whoever
still waits for an answer. Both sides hold the same bytes of keys and values: those of --rows
baseline rows that reserve --reserved tokens each. Prompts are random tokens, lengths of answers are
forced, decoding is greedy. Times count from the moment a request was due, and a token comes when
its step returns. The objective is what 99 % of first tokens and 99 % of gaps between tokens must
keep; goodput counts the requests that keep it each for itself. `users served` compares the highest
rates at which the sides keep it.
"""

import argparse
import json
import pathlib
import sys

from benchmarks.arrivals import (
    Arrival,
    Trace,
    drawn_arrivals,
    prompts_of,
    read_arrivals,
    replaced_lengths,
    scaled_lengths,
)
from benchmarks.measure import CompileLog, provenance
from benchmarks.open_loop import RealClock, replay
from benchmarks.others import OthersShare
from benchmarks.plot_serving import draw
from benchmarks.rate_search import highest_kept, search, take_turns
from benchmarks.serving_metrics import Objective, serving_metrics
from benchmarks.serving_options import parse_options
from benchmarks.serving_sides import PAGED, Side, make_sides

Results = dict[str, dict[float, dict]]  # of each side, by rate


def main() -> None:
    """Prints a table for people and, last, one JSON line."""
    options = parse_options(__doc__)
    try:
        trace = _trace(options)
    except ValueError as error:  # before anything is loaded
        raise SystemExit(f"serving_sim: {error}") from None
    compiles = CompileLog()
    made = make_sides(options)
    prompts = prompts_of(
        trace,
        vocab_size=made.vocab_size,
        num_shared=options.shared_prefix,
        seed=options.seed,
    )
    objective = Objective(ttft_ms=options.ttft_ms, itl_ms=options.itl_ms)
    for side in made.sides:  # every program was compiled when the side was made
        few = [Arrival(seconds=0.0, prompt=prompt, max_tokens=4) for prompt in prompts[:4]]
        replay(side.start(), few, RealClock())
    compiles.events.clear()
    results = _measure(options, trace, prompts, made.sides, objective)
    report = _report(options, trace, made.sides, results)
    report["compiles_after_warm_up"] = len(compiles.events)
    _print_table(report)
    # Before the picture, which may fail: the figures took minutes.
    print(json.dumps({**report, "model": made.model_source, **provenance()}), flush=True)
    if options.plot:
        draw(report, options.plot)


def _trace(options: argparse.Namespace) -> Trace:
    if options.trace:
        trace = read_arrivals(options.trace, options.requests, first=options.first)
    else:
        trace = drawn_arrivals(options.requests, seed=options.seed)
    if options.lengths:
        trace = replaced_lengths(trace, options.lengths, seed=options.seed)
    return scaled_lengths(
        trace,
        options.length_scale,
        max_input=options.max_input,
        max_output=options.max_output,
    )


def _measure(
    options: argparse.Namespace,
    trace: Trace,
    prompts: list[list[int]],
    sides: list[Side],
    objective: Objective,
) -> Results:
    """Every rate on every side, and then, if asked for, a search on each; the sides take turns."""
    by_name = {side.name: side for side in sides}
    results: Results = {side.name: {} for side in sides}

    def is_kept(name: str, rate: float) -> bool:
        known = results[name]
        if rate not in known:
            load = OthersShare()
            run = replay(by_name[name].start(), trace.at_rate(rate, prompts), RealClock())
            metrics = serving_metrics(run, objective)
            known[rate] = {
                "request_rate": round(rate, 4),
                "within_objective": objective.kept_by(metrics),
                **metrics,
                "others_share": load.now(),
            }
            print(_line(name, known[rate]), file=sys.stderr)
        return known[rate]["within_objective"]

    for rate in options.rates:
        for name in by_name:
            is_kept(name, rate)
    if options.search:
        starts = {name: _highest(results[name]) or min(options.rates) for name in by_name}
        searches = {
            name: search(start, num_bisections=options.bisections) for name, start in starts.items()
        }
        take_turns(searches, is_kept)
    return results


def _highest(of_side: dict[float, dict]) -> float | None:
    return highest_kept({rate: one["within_objective"] for rate, one in of_side.items()})


def _report(options: argparse.Namespace, trace: Trace, sides: list[Side], results: Results) -> dict:
    highest = {name: _highest(of_side) for name, of_side in results.items()}
    rounded = {name: None if rate is None else round(rate, 4) for name, rate in highest.items()}
    paged = highest[PAGED]
    source = f"laws of the Azure conversation trace, seed {options.seed}"
    arrivals = pathlib.Path(options.trace).name if options.trace else source
    return {
        "benchmark": "serving_sim",
        "arrivals": arrivals,
        "lengths": pathlib.Path(options.lengths).name if options.lengths else arrivals,
        "length_scale": options.length_scale,
        "max_input": options.max_input,
        "max_output": options.max_output,
        "shared_prefix": options.shared_prefix,
        "requests": len(trace.lengths),
        "prompt_tokens": sum(pair.input_tokens for pair in trace.lengths),
        "output_tokens": sum(pair.output_tokens for pair in trace.lengths),
        "dtype": options.dtype,
        "objective": {"p99_ttft_ms": options.ttft_ms, "p99_itl_ms": options.itl_ms},
        "sides": {
            side.name: {
                "rows": side.rows,
                "reserved": side.reserved,
                "attention": side.attention,
                "cache_mib": round(side.cache_bytes / 2**20, 1),
                "highest_rate": rounded[side.name],
                "results": [results[side.name][rate] for rate in sorted(results[side.name])],
            }
            for side in sides
        },
        "users_served": {
            name: round(paged / rate, 2)
            for name, rate in highest.items()
            if name != PAGED and paged and rate
        },
    }


def _print_table(report: dict) -> None:
    objective = report["objective"]
    print(
        f"{report['requests']} requests, {report['prompt_tokens']} prompt tokens, "
        f"{report['output_tokens']} output tokens; arrivals: {report['arrivals']}; lengths: "
        f"{report['lengths']}, times {report['length_scale']:g}, at most {report['max_input']} and "
        f"{report['max_output']}; {report['dtype']}"
    )
    print(
        f"objective: p99 TTFT {objective['p99_ttft_ms']:g} ms, p99 ITL "
        f"{objective['p99_itl_ms']:g} ms"
    )
    for name, side in report["sides"].items():
        reserved = f" that reserve {side['reserved']} tokens" if side["reserved"] else ""
        print(f"{name}: {side['cache_mib']} MiB of KV, {side['rows']} rows{reserved}")
        for result in side["results"]:
            print("  " + _line(name, result))
    for name, side in report["sides"].items():
        print(f"{name}: " + _best(side, report["users_served"].get(name)))
    print(f"compiles after warm-up: {report['compiles_after_warm_up']}")


def _best(side: dict, over: float | None) -> str:
    """What a side serves within the objective, and how many times as many users the engine does."""
    rate = side["highest_rate"]
    if rate is None:
        return "no rate kept the objective"
    best = next(result for result in side["results"] if result["request_rate"] == rate)
    return (
        f"{rate:g} requests/s within the objective, {best['users_at_once_mean']:.1f} users at "
        f"once on average and {best['users_at_once_peak']} at most"
        + (f"; paged serves {over:g} times as many" if over else "")
    )


def _line(name: str, result: dict) -> str:
    """One run in one line."""
    itl = result["p99_itl_ms"]
    return (
        f"{name:16} {result['request_rate']:6.3f}/s {_verdict(result):6} "
        f"TTFT p50 {result['median_ttft_ms']:8.0f} p99 {result['p99_ttft_ms']:8.0f} ms, "
        f"ITL p99 {'none' if itl is None else f'{itl:.0f}'} ms, "
        f"queue p99 {result['p99_queue_ms']:8.0f} ms, goodput {result['request_goodput']:6.3f}/s, "
        f"{result['output_throughput']:6.1f} tokens/s, users {result['users_at_once_mean']:.1f}, "
        f"at most {result['users_at_once_peak']}"
    )


def _verdict(result: dict) -> str:
    return "kept" if result["within_objective"] else "missed"


if __name__ == "__main__":
    main()
