"""A figure's points as a table for people."""

from benchmarks.paper.points import LATENCY


def print_table(report: dict) -> None:
    """Panel by panel, a line for each point; swapped are blocks, computed are tokens."""
    print(
        f"{report['figure']}: {report['title']} (figure {report['of_paper']} of the paper), "
        f"{report['requests']} requests, {report['dtype']}"
    )
    for panel in dict.fromkeys(point["panel"] for point in report["points"]):
        points = [point for point in report["points"] if point["panel"] == panel]
        inputs, outputs = points[0]["total_input_tokens"], points[0]["total_output_tokens"]
        print(f"{panel}: {inputs} prompt tokens, {outputs} output tokens")
        print(
            f"  {'side':17} {'KV MiB':>7} {'block':>6} {'rate/s':>7} {'s/token':>8} {'E2EL s':>7} "
            f"{'tokens/s':>9} {'users':>6} {'preempted':>10} {'swapped':>8} {'computed':>9} "
            f"{'cached':>7} {'others':>7}"
        )
        for point in points:
            print("  " + _line(point))
    print(f"compiles after warm-up: {report['compiles_after_warm_up']}")


def _line(point: dict) -> str:
    return (
        f"{point['side']:17} {point['cache_mib']:7.1f} {_or_dash(point['block_size'], 6)} "
        f"{point['request_rate']:7.3g} {point[LATENCY] / 1e3:8.3f} "
        f"{point['mean_e2el_ms'] / 1e3:7.2f} {point['output_throughput']:9.1f} "
        f"{point['users_at_once_mean']:6.1f} {_or_dash(point.get('preemptions'), 10)} "
        f"{_or_dash(point.get('swapped_out_blocks'), 8)} "
        f"{_or_dash(point.get('computed_tokens'), 9)} "
        f"{_or_dash(_cached(point), 7, '.0%')} {_or_dash(point['others_share'], 7, '.0%')}"
    )


def _cached(point: dict) -> float | None:
    """The share of prompts found in the prefix cache."""
    queried = point.get("queried_tokens")
    return point["hit_tokens"] / queried if queried else None


def _or_dash(value: float | None, width: int, form: str = "d") -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
