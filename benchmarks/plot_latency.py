"""The latency benchmark's figures as a picture."""

from benchmarks.plot_serving import COLORS
from benchmarks.png import load_pyplot, save

PANELS = {
    "e2el": "the whole batch (E2EL)",
    "ttft": "first token (TTFT)",
    "tpot": "each other token (TPOT)",
}


def draw(report: dict, path: str) -> None:
    """Writes a PNG of three panels: medians as bars, and a mark at the p99 of each."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
    for ax, (kind, title) in zip(axes, PANELS.items(), strict=True):
        _draw_panel(ax, report["sides"], kind)
        ax.set_title(f"{title}, ms", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report['batch_size']} requests at once, {report['input_len']} prompt tokens and "
        f"{report['output_len']} output tokens each; bars: median, marks: p99",
        fontsize=11,
    )
    save(figure, path)


def _draw_panel(ax, sides: dict[str, dict], kind: str) -> None:
    found = {name: side for name, side in sides.items() if side[f"median_{kind}_ms"] is not None}
    if not found:
        ax.text(0.5, 0.5, "no second token", ha="center", transform=ax.transAxes)
        return
    medians = [side[f"median_{kind}_ms"] for side in found.values()]
    colors = [COLORS[name] for name in found]
    bars = ax.bar(list(found), medians, color=colors, width=0.6)
    ax.bar_label(bars, [f"{median:.4g}" for median in medians], label_type="center", color="white")
    p99 = [side[f"p99_{kind}_ms"] for side in found.values()]
    ax.plot(list(found), p99, "k_", markersize=22)
