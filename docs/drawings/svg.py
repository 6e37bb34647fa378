"""Pieces of an SVG drawing, as text. Words outside the boxes take the page's own colour."""

import html
from collections.abc import Iterable

# Those of `jpaged.marks`: Okabe and Ito's, which colour-blind people can tell apart.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#F0E442", "#D55E00")
LINE = "#888"
WIDTH = 720

_STYLE = """
.drawing{color:#111;font:13px system-ui,-apple-system,'Segoe UI',sans-serif}
.drawing text{fill:currentColor}
.drawing .ink{fill:#000}
.drawing .light{fill:#fff}
.drawing .bold{font-weight:600}
.drawing .small{font-size:12px}
@media (prefers-color-scheme:dark){.drawing{color:#eee}}
"""
_PATTERNS = (
    '<pattern id="{id}-kept" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" stroke="#888" '
    'stroke-width="1.6"/></pattern>'
)


def drawing(name: str, title: str, height: int, pieces: Iterable[str]) -> str:
    """A whole drawing; `name` makes its patterns its own where several stand in one page."""
    body = "\n".join(pieces)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-labelledby="{name}-title">\n'
        f'<title id="{name}-title">{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<defs>{_PATTERNS.format(id=name)}</defs>\n{body}\n</svg>\n"
    )


def color(index: int) -> str:
    """A sequence's colour."""
    return COLORS[index % len(COLORS)]


def words(x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> str:
    """A line of text whose baseline begins, ends or has its middle at (x, y)."""
    kind = f' class="{style}"' if style else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}"{kind}{at}>{html.escape(text)}</text>'


def box(
    x: float, y: float, width: float, height: float, *, fill: str = "none", stroke: str = LINE
) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, stroke: str = LINE, dash: str = "") -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}" '
        f'stroke-width="1.5"{dashes}/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, *, stroke: str) -> str:
    """A curve from left to right with a head at its end."""
    bend = (x2 - x1) / 2
    return (
        f'<path d="M{x1:g} {y1:g} C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2 - 7:g} {y2:g}" '
        f'fill="none" stroke="{stroke}" stroke-width="2"/>'
        f'<path d="M{x2:g} {y2:g} l-9 -4.5 v9 z" fill="{stroke}"/>'
    )


def cross(x: float, y: float, width: float, height: float) -> str:
    """A box that nobody may use."""
    right, bottom = x + width, y + height
    return box(x, y, width, height) + line(x, y, right, bottom) + line(x, bottom, right, y)


def ink(index: int) -> str:
    """The style of words on a sequence's colour."""
    return "light" if color(index) == "#0072B2" else "ink"
