"""The figures as one picture."""

import importlib

from benchmarks.paper.figure import Axis
from benchmarks.paper.points import LATENCY
from benchmarks.plot_serving import COLORS
from benchmarks.png import load_pyplot, save

LABELS = {
    Axis.REQUEST_RATE.value: "requests a second",
    Axis.BLOCK_SIZE.value: "tokens of a block",
}
OWN_COLORS = {
    "prefix cache": "#2a7f62",
    "no prefix cache": "#e0a458",
    "recomputing": "#2a7f62",
    "swapping": "#0072B2",
}


def draw(reports: list[dict], path: str) -> None:
    """Writes a PNG: a row for each figure, a panel for each workload."""
    pyplot = load_pyplot()
    width = 5.5 * max(len(_panels(report)) for report in reports)
    figure = pyplot.figure(figsize=(max(7, width), 4.2 * len(reports)), layout="constrained")
    rows = figure.subfigures(len(reports), 1, squeeze=False)
    for (row,), report in zip(rows, reports, strict=True):
        panels = _panels(report)
        (axes,) = row.subplots(1, len(panels), squeeze=False, sharey=True)
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, report["axis"], panel)
            ax.set_title(panel[0]["panel"], fontsize=10)
        highest = max(point[LATENCY] for point in report["points"]) / 1e3
        axes[0].set_ylim(0, 1.08 * highest)  # of all panels: they share it
        axes[0].set_ylabel("normalised latency, s/token", fontsize=9)
        row.suptitle(f"{report['title']} (figure {report['of_paper']} of the paper)", fontsize=11)
    save(figure, path)


def _panels(report: dict) -> list[list[dict]]:
    names = dict.fromkeys(point["panel"] for point in report["points"])
    return [[point for point in report["points"] if point["panel"] == name] for name in names]


def _draw_panel(ax, axis: str, points: list[dict]) -> None:
    # Lines of a figure by block size are also told apart by their rate.
    lines: dict[tuple, list[dict]] = {}
    for point in points:
        rate = point["request_rate"] if axis == Axis.BLOCK_SIZE.value else None
        lines.setdefault((point["side"], rate), []).append(point)
    for (side, rate), line in lines.items():
        in_order = sorted(line, key=lambda point: point[axis])
        ax.plot(
            [point[axis] for point in in_order],
            [point[LATENCY] / 1e3 for point in in_order],
            "o-",
            color=(COLORS | OWN_COLORS)[side],
            label=side if rate is None else f"{side}, {rate:g} requests/s",
        )
    ticks = sorted({point[axis] for point in points})
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=8)
    ax.xaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").NullLocator())
    ax.set_xlabel(LABELS[axis], fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#eeeeee")
    ax.legend(frameon=False, fontsize=8)
