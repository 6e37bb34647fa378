"""The comparison of engines as a picture: a group of bars a set of requests."""

from benchmarks.png import load_pyplot, save

COLORS = {
    "jpaged": "#2a7f62",
    "vllm": "#0072B2",
    "openvino": "#e0a458",
    "transformers": "#9a6fb0",
    "llama.cpp": "#8a8a8a",
}


def draw(report: dict, path: str) -> None:
    """Writes a PNG: output tokens a second of every side, one axis for each set."""
    pyplot = load_pyplot()
    sets = report["sets"]
    figure, axes = pyplot.subplots(
        1, len(sets), figsize=(3.4 * len(sets), 3.6), layout="constrained", squeeze=False
    )
    for ax, (name, by_side) in zip(axes[0], sets.items(), strict=True):
        figures = [found["output_throughput"] for found in by_side.values()]
        bars = ax.bar(list(by_side), figures, color=[COLORS[side] for side in by_side])
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
        ax.set_title(name, fontsize=10)
        ax.tick_params(axis="x", labelrotation=35, labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"output tokens a second, {report['dtype']}", fontsize=9)
    save(figure, path)
