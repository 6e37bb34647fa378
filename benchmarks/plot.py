"""The memory benchmark's figures as a picture."""

import importlib.util
import itertools
import textwrap

from benchmarks.moment import Moment
from benchmarks.plot_pool import draw_marks, draw_pool, draw_tables
from benchmarks.png import load_pyplot, save
from jpaged.stats import share
from jpaged.trace import StepRecord

KINDS = {
    "effective": ("tokens held", "#2a7f62"),
    "reserved": ("reserved, used later", "#8fc1a9"),
    "internal": ("reserved, never used", "#e0a458"),
    "external": ("free, not given out", "#c9c9c9"),
}


def has_matplotlib() -> bool:
    """Whether a picture can be drawn; matplotlib is no dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(reports: list[dict], moment: Moment, path: str) -> None:
    """Writes a PNG of three rows: averages, the pool at a moment of a replay, and its steps.

    The averages are a bar a policy for each trace, and the waste of blocks beside theory.
    """
    pyplot = load_pyplot()
    width = max(12.0, 3.4 * (len(reports) + 1) + 1.5)
    figure = pyplot.figure(figsize=(width, 14.5), layout="constrained")
    averages, pool, steps = figure.subfigures(3, 1, height_ratios=(5.2, 6.1, 3.2), hspace=0.04)
    _draw_averages(averages, reports)
    _draw_moment(pool, moment)
    steps.suptitle("The same replay, step by step", fontsize=12)
    draw_steps(steps.subplots(1, 3), moment.steps, moment=moment.step)
    save(figure, path)


def draw_steps(axes, steps: list[StepRecord], *, moment: int | None = None) -> None:
    """On three axes: where the blocks are, what is wasted and shared, what the cache answers.

    Args:
        axes: matplotlib's, three.
        steps: what `LLM.trace` records.
        moment: the number of a step to be marked.
    """
    numbers = [record["step"] for record in steps]
    blocks, shares, hits = axes
    used = [record["blocks_used"] for record in steps]
    cached = [record["blocks_cached"] for record in steps]
    blank = [record["blocks_free"] - record["blocks_cached"] for record in steps]
    colors = (KINDS["effective"][1], KINDS["reserved"][1], "#e8e8e8")
    blocks.stackplot(
        numbers, used, cached, blank, colors=colors, labels=("in use", "kept", "empty")
    )
    preempted = [record["step"] for record in steps if record["preemptions"]]
    if preempted:
        blocks.plot(preempted, [0] * len(preempted), "k|", markersize=9, label="preemption")
    blocks.set_title("blocks of the pool", fontsize=9)
    for name, label, color in (
        ("waste", "waste: slots in use without a token", "#D55E00"),
        ("saving", "saving: table entries without a block", "#0072B2"),
    ):
        shares.plot(numbers, [100 * record[name] for record in steps], color=color, label=label)
    shares.set_title("what paging wastes and sharing saves", fontsize=9)
    _draw_hits(hits, steps)
    for ax in axes:
        if ax is not blocks:
            ax.yaxis.set_major_formatter("{x:.0f} %")
        if moment is not None:
            ax.axvline(
                moment, color="#555555", linestyle=":", linewidth=1, label="the moment above"
            )
        ax.set_xlabel("step", fontsize=9)
        ax.margins(x=0)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=8
        )


def _draw_hits(ax, steps: list[StepRecord]) -> None:
    """The share of tokens that the cache held: where sequences started, and since the beginning."""
    numbers = [record["step"] for record in steps]
    started = [record for record in steps if record["queried_tokens"]]
    ax.plot(
        [record["step"] for record in started],
        [100 * record["hit_tokens"] / record["queried_tokens"] for record in started],
        ".",
        color="#56B4E9",
        markersize=5,
        label="of sequences that start",
    )
    hit = itertools.accumulate(record["hit_tokens"] for record in steps)
    queried = itertools.accumulate(record["queried_tokens"] for record in steps)
    so_far = [100 * share(a, b) for a, b in zip(hit, queried, strict=True)]
    ax.plot(numbers, so_far, color="#0072B2", label="so far")
    ax.set_title("prompt tokens found in the prefix cache", fontsize=9)


def _draw_averages(figure, reports: list[dict]) -> None:
    axes = figure.subplots(1, len(reports) + 1, squeeze=False)
    for ax, report in zip(axes[0], reports, strict=False):
        _draw_shares(ax, report)
    axes[0][0].set_ylabel("share of the same pool, averaged over time")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(KINDS), frameon=False)
    _draw_waste(axes[0][-1], reports)
    figure.suptitle("Where key/value memory goes while requests wait", fontsize=12)


def _draw_moment(figure, moment: Moment) -> None:
    snapshot = moment.snapshot
    pool, tables = figure.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.03)
    cells, legend = pool.subplots(2, 1, height_ratios=(9, 1))
    draw_pool(cells, snapshot)
    draw_marks(legend)
    draw_tables(tables.subplots(), snapshot)
    figure.suptitle(f"The pool and its tables at step {moment.step} of a replay", fontsize=12)


def _draw_shares(ax, report: dict) -> None:
    policies = report["shares"]
    bottom = [0.0] * len(policies)
    for kind, (label, color) in KINDS.items():
        values = [100 * shares[kind] for shares in policies.values()]
        bars = ax.bar(list(policies), values, bottom=bottom, color=color, label=label, width=0.8)
        texts = [f"{value:.0f}" if value >= 4 else "" for value in values]
        shade = "white" if kind == "effective" else "black"
        ax.bar_label(bars, texts, label_type="center", fontsize=9, color=shade)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    ax.set_title(f"{_name(report)}\nlongest {report['longest']:,} tokens", fontsize=9)
    ax.set_ylim(0, 100)
    ax.yaxis.set_major_formatter("{x:.0f} %")
    ax.tick_params(axis="x", labelrotation=30)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_waste(ax, reports: list[dict]) -> None:
    names = [_name(report) for report in reports]
    measured = [100 * report["waste"] for report in reports]
    theory = [100 * report["waste_theory"] for report in reports]
    bars = ax.barh(names, measured, color=KINDS["internal"][1], height=0.5, label="measured")
    ax.plot(theory, names, "k|", markersize=16, label="theory")
    ax.bar_label(bars, [f"  {value:.2f} %" for value in measured], fontsize=9)
    ax.set_xlim(0, 1.35 * max(4, *measured))
    ax.axvline(4, color="#b03030", linestyle="--", linewidth=1, label="the paper's 4 %")
    ax.set_title("waste of allocated blocks", fontsize=9)
    ax.xaxis.set_major_formatter("{x:.0f} %")
    ax.tick_params(axis="y", labelsize=8)
    ax.invert_yaxis()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _name(report: dict) -> str:
    """The trace's name in lines that are no wider than a bar chart."""
    name = report["lengths"].removesuffix(".csv").removesuffix(".jsonl")
    return "\n".join(textwrap.wrap(name.replace("_", " "), 24))
