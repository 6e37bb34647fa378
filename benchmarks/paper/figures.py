"""The figures by name."""

from benchmarks.paper import block_size, chat, latency, shared_prefix, swap
from benchmarks.paper.figure import Figure

FIGURES: dict[str, Figure] = {
    "latency": latency.FIGURE,
    "shared-prefix": shared_prefix.FIGURE,
    "chat": chat.FIGURE,
    "block-size": block_size.FIGURE,
    "swap": swap.FIGURE,
}
