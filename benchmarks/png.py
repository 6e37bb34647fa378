"""How every benchmark's picture begins and ends; matplotlib is no dependency."""

import importlib
from typing import Any


def load_pyplot() -> Any:
    """matplotlib.pyplot, which opens no window."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save(figure: Any, path: str) -> None:
    """Writes the PNG and gives the figure's memory back."""
    figure.savefig(path, dpi=110)
    load_pyplot().close(figure)
