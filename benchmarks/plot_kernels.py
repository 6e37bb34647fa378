"""The benchmark of attention alone as a picture."""

from benchmarks.png import load_pyplot, save

COLORS = {
    "cpu": "#2a7f62",
    "pallas-gpu": "#2a7f62",
    "pallas-tpu": "#2a7f62",
    "mosaic-gpu": "#0072B2",
    "xla": "#8fc1a9",
    "contiguous": "#e0a458",
}
WIDTH = 0.8  # of a group of bars


def draw(report: dict, path: str) -> None:
    """Writes a PNG: for each shape a bar a side, and the roof as a line across them."""
    pyplot = load_pyplot()
    results = report["results"]
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(max(4.0, 2.2 * len(results)), 4.2), layout="constrained"
    )
    for ax, result in zip([axes] if len(results) == 1 else axes, results, strict=True):
        _draw_shape(ax, result)
    heads = "/".join(map(str, report["heads"]))
    figure.suptitle(
        f"Attention alone, heads {heads}, pool of {report['dtype']}: ms a call, best of "
        f"{report['repeats']}; red: the roof",
        fontsize=11,
    )
    save(figure, path)


def _draw_shape(ax, result: dict) -> None:
    sides = result["sides"]
    best = [side["min_ms"] for side in sides.values()]
    bars = ax.bar(list(sides), best, color=[COLORS[name] for name in sides], width=WIDTH)
    ax.bar_label(bars, [f"{ms:.3g}" for ms in best], fontsize=8)
    ax.axhline(result["roof_ms"], color="#b03030", linewidth=1.2)
    ax.set_title(f"{result['shape']}\nroof of {result['roof_of']}", fontsize=9)
    ax.tick_params(axis="x", labelrotation=45, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
