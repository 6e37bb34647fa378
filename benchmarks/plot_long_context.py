"""The benchmark of long prompts as a picture."""

from benchmarks.png import load_pyplot, save

PANELS = {
    "prefill_s": "prefill, seconds",
    "decode_ms": "each decoded token, ms",
}


def draw(report: dict, path: str) -> None:
    """Writes a PNG of three panels against the context: prefill, decode, and bytes."""
    pyplot = load_pyplot()
    results = sorted(report["results"], key=lambda result: result["context"])
    contexts = [result["context"] for result in results]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, (kind, title) in zip(axes, PANELS.items(), strict=False):
        ax.plot(contexts, [result[kind] for result in results], "o-", color="#2a7f62")
        ax.set_title(title, fontsize=10)
    _draw_bytes(axes[-1], contexts, results)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8)
        ax.set_yscale("log")
        ax.set_xlabel("tokens of context", fontsize=9)
        ax.grid(color="#eeeeee")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"One long prompt in chunks of {report['max_num_batched_tokens']}, attention by "
        f"{report['attention']}",
        fontsize=11,
    )
    save(figure, path)


def _draw_bytes(ax, contexts: list[int], results: list[dict]) -> None:
    for kind, label, color in (
        ("temporary_bytes", "temporaries of the step", "#2a7f62"),
        ("scores_bytes", "a chunk's scores, if they were a matrix", "#b03030"),
        ("kv_bytes", "keys and values", "#e0a458"),
    ):
        ax.plot(contexts, [r[kind] / 1e6 for r in results], "o-", color=color, label=label)
    ax.set_title("MB", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
