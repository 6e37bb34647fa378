"""A snapshot of the pool drawn with matplotlib, cell by cell as `jpaged.show` draws it."""

import textwrap
from collections.abc import Sequence

from jpaged import marks
from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState

COLUMNS = 13
BOX = (0.9, 0.52)  # of a cell that is 1 wide and 1 high
MAX_BANDS = 4
HATCHES = ("", "////", "....")  # as many as there are textures
INK = "#333333"
TITLE = 72  # characters a line
MAX_ENTRIES = 14
MAX_TABLES = 16
TABLE_COLUMNS = (0.0, 1.4, 5.4, 8.6)  # letter, request, tokens, blocks


def draw_pool(ax, snapshot: Snapshot) -> None:
    """The blocks in order of their numbers, with their owners' colours and letters."""
    pieces = marks.folded(snapshot, max_cells=COLUMNS * COLUMNS)
    for place, piece in enumerate(pieces):
        y, x = divmod(place, COLUMNS)
        if isinstance(piece, marks.Gap):
            ax.text(x + BOX[0] / 2, y + 0.7, str(piece), fontsize=5, ha="center", color=INK)
        else:
            _draw_cell(ax, snapshot, piece, x, y)
    ax.set_xlim(-0.1, COLUMNS)
    ax.set_ylim(-(-len(pieces) // COLUMNS) + 0.1, -0.1)
    ax.set_axis_off()
    ax.set_title(textwrap.fill(marks.headline(snapshot), TITLE), fontsize=9, loc="left")


def draw_marks(ax) -> None:
    """What the marks mean, in one line below the pool."""
    entries = [
        (BlockKind.USED, [0], 1.0, "A", "A's, full"),
        (BlockKind.USED, [0], 0.4, "A", "room left"),
        (BlockKind.USED, [0, 1], 1.0, "×2", "shared"),
        (BlockKind.CACHED, [], 1.0, "", "kept"),
        (BlockKind.FREE, [], 0.0, "", "empty"),
        (BlockKind.NULL, [], 0.0, "", "never used"),
    ]
    width = COLUMNS / len(entries)
    for place, (kind, rows, share, who, words) in enumerate(entries):
        x = place * width
        _draw_box(ax, kind, rows, share, x, 0.0)
        ax.text(
            x + BOX[0], 0.37, who, fontsize=6, ha="right", va="bottom", weight="bold", color=INK
        )
        ax.text(x + BOX[0] / 2, 1.0, words, fontsize=7, ha="center", va="top", color=INK)
    ax.set_xlim(-0.5, COLUMNS - 0.6)
    ax.set_ylim(1.4, 0)
    ax.set_axis_off()


def draw_tables(ax, snapshot: Snapshot) -> None:
    """A line for each sequence: its letter, its request, its tokens, and its blocks in order."""
    tables = snapshot.tables[:MAX_TABLES]
    for y, table in enumerate(tables):
        _draw_table(ax, snapshot, table, y)
    if len(snapshot.tables) > len(tables):
        more = marks.counted(len(snapshot.tables) - len(tables), "more sequence")
        ax.text(TABLE_COLUMNS[1], len(tables) + 0.4, f"… and {more}", fontsize=8, color=INK)
    ax.set_xlim(0, TABLE_COLUMNS[-1] + 1.1 * MAX_ENTRIES + 0.3)
    ax.set_ylim(max(len(tables), 8) + 0.6, -0.1)
    ax.set_axis_off()
    ax.set_title(textwrap.fill(marks.summary(snapshot), TITLE), fontsize=9, loc="left")


def _draw_cell(ax, snapshot: Snapshot, block: BlockState, x: float, y: float) -> None:
    rows, share = marks.rows_of(snapshot, block.block_id), block.num_tokens / snapshot.block_size
    _draw_box(ax, block.kind, rows, share, x, y)
    ax.text(x, y + 0.35, str(block.block_id), fontsize=6, va="bottom", color=INK)
    who = marks.who(snapshot, block.block_id)
    ax.text(
        x + BOX[0], y + 0.35, who, fontsize=6, ha="right", va="bottom", weight="bold", color=INK
    )


def _draw_box(ax, kind: BlockKind, rows: Sequence[int], share: float, x: float, y: float) -> None:
    """A glass below the caption, filled from its bottom; y grows downwards."""
    width, height = BOX
    top = y + 0.38
    if kind is BlockKind.USED:
        shown = rows[:MAX_BANDS]
        for place, row in enumerate(shown):
            left, part = x + width * place / len(shown), width / len(shown)
            corner = (left, top + height * (1 - share))
            _rectangle(ax, corner, part, height * share, row=row)
    elif kind is BlockKind.CACHED:
        _rectangle(ax, (x, top), width, height, hatch="//////", edge="#bbbbbb")
    elif kind is BlockKind.NULL:
        for bottom in (top, top + height):
            ax.plot([x, x + width], [bottom, 2 * top + height - bottom], color="#999999", lw=0.6)
    edge = "#cccccc" if kind is BlockKind.FREE else "#777777"
    _rectangle(ax, (x, top), width, height, edge=edge)


def _rectangle(
    ax,
    corner: tuple[float, float],
    width: float,
    height: float,
    *,
    row: int | None = None,
    hatch: str = "",
    edge: str = "none",
) -> None:
    """An outline, a hatched one, or a row's colour and texture."""
    face = "none" if row is None else marks.color(row)
    if row is not None and marks.texture(row):
        hatch, edge = HATCHES[marks.texture(row)], "white"
    (left, top), right, bottom = corner, corner[0] + width, corner[1] + height
    ax.fill(
        [left, right, right, left],
        [top, top, bottom, bottom],
        facecolor=face,
        edgecolor=edge,
        hatch=hatch,
        linewidth=0.6,
    )


def _draw_table(ax, snapshot: Snapshot, table: TableState, y: float) -> None:
    letter, request, tokens, blocks = TABLE_COLUMNS
    _draw_pill(ax, [table.row], marks.letter(table.row), letter, y)
    words = marks.shortened(marks.short_title(table), 18)
    ax.text(request, y + 0.4, words, fontsize=8, va="center", color=INK)
    size = marks.counted(table.num_computed_tokens, "token")
    ax.text(tokens, y + 0.4, size, fontsize=8, va="center", color=INK)
    first, num_left_out, last = marks.shown_entries(table.block_ids, MAX_ENTRIES)
    x = blocks
    for block_id in first:
        _draw_pill(ax, marks.rows_of(snapshot, block_id), str(block_id), x, y)
        x += 1.1
    if num_left_out:
        ax.text(x + 1.0, y + 0.4, f"… {num_left_out} …", fontsize=6.5, ha="center", va="center")
        x += 2.2
    for block_id in last:
        _draw_pill(ax, marks.rows_of(snapshot, block_id), str(block_id), x, y)
        x += 1.1


def _draw_pill(ax, rows: Sequence[int], text: str, x: float, y: float) -> None:
    """Words on their first owner's colour, above a strip of its texture or the others' colours."""
    width, height, strip = 1.0, 0.62, 0.14
    _rectangle(ax, (x, y + 0.09), width, height + strip, row=rows[0] % len(marks.COLORS))
    others = rows[1:MAX_BANDS] or rows[:1]
    for place, row in enumerate(others):
        corner = (x + width * place / len(others), y + 0.09 + height)
        _rectangle(ax, corner, width / len(others), strip, row=row)
    ink = "white" if marks.color(rows[0]) == "#0072B2" else "black"
    ax.text(x + width / 2, y + 0.42, text, fontsize=6.5, ha="center", va="center", color=ink)
