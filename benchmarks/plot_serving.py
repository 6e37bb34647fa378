"""The serving benchmark's figures as a picture."""

import importlib

from benchmarks.png import load_pyplot, save

COLORS = {
    "paged": "#2a7f62",
    "unpaged": "#e0a458",
    "unpaged-tight": "#b03030",
    "unpaged-refilled": "#0072B2",
}


def draw(report: dict, path: str) -> None:
    """Writes a PNG: TTFT and goodput against the rate, a colour for each side."""
    pyplot = load_pyplot()
    figure, (ttft, goodput) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, side in report["sides"].items():
        rates = [result["request_rate"] for result in side["results"]]
        median = [result["median_ttft_ms"] / 1e3 for result in side["results"]]
        p99 = [result["p99_ttft_ms"] / 1e3 for result in side["results"]]
        good = [result["request_goodput"] for result in side["results"]]
        color = COLORS[name]
        ttft.plot(rates, p99, "o-", color=color, label=f"{name}, p99")
        ttft.plot(rates, median, "o--", color=color, alpha=0.6, label=f"{name}, median")
        goodput.plot(rates, good, "o-", color=color, label=name)
        if side["highest_rate"]:
            goodput.axvline(side["highest_rate"], color=color, linestyle=":", linewidth=1.2)
    _finish_ttft(ttft, report)
    _finish_goodput(goodput, report)
    figure.suptitle(
        f"{report['requests']} requests, arrivals of {report['arrivals']}, every side with the "
        "same bytes of keys and values",
        fontsize=11,
    )
    save(figure, path)


def _finish_ttft(ax, report: dict) -> None:
    limit = report["objective"]["p99_ttft_ms"] / 1e3
    ax.axhline(limit, color="#555555", linestyle=":", linewidth=1.2, label="objective")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title("time to first token, seconds", fontsize=10)
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(axis="y", which="both", labelsize=8)
    _finish(ax, report)


def _finish_goodput(ax, report: dict) -> None:
    rates = _rates(report)
    ax.plot(rates, rates, color="#999999", linewidth=1, label="all that come")
    ax.set_xscale("log")
    ax.set_title(
        "goodput, requests/s that keep the objective\ndotted: highest rate whose p99 keeps it",
        fontsize=10,
    )
    ax.set_ylim(bottom=0)
    _finish(ax, report)


def _finish(ax, report: dict) -> None:
    rates = _rates(report)
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates], rotation=60, fontsize=8)
    ax.xaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").NullLocator())
    ax.set_xlabel("requests a second", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#eeeeee")
    ax.legend(frameon=False, fontsize=8)


def _rates(report: dict) -> list[float]:
    found = {r["request_rate"] for side in report["sides"].values() for r in side["results"]}
    return sorted(found)
