"""The memory benchmark's figures as a picture."""

import importlib
import importlib.util
import textwrap

KINDS = {
    "effective": ("tokens held", "#2a7f62"),
    "reserved": ("reserved, used later", "#8fc1a9"),
    "internal": ("reserved, never used", "#e0a458"),
    "external": ("free, not given out", "#c9c9c9"),
}


def has_matplotlib() -> bool:
    """Whether a picture can be drawn; matplotlib is no dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(reports: list[dict], path: str) -> None:
    """Writes a PNG: for each trace a bar a policy, and below the waste of blocks beside theory."""
    importlib.import_module("matplotlib").use("Agg")  # no window
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1,
        len(reports) + 1,
        figsize=(3.4 * (len(reports) + 1) + 1.5, 5.2),
        layout="constrained",
        squeeze=False,
    )
    for ax, report in zip(axes[0], reports, strict=False):
        _draw_shares(ax, report)
    axes[0][0].set_ylabel("share of the same pool, averaged over time")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(KINDS), frameon=False)
    _draw_waste(axes[0][-1], reports)
    figure.suptitle("Where key/value memory goes while requests wait")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
