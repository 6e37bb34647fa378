"""A snapshot in letters and bars, for a terminal."""

import textwrap

from jpaged import marks
from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState

LINE = 96  # characters
CELLS = 16  # a line
LEGEND = (
    "A█ in use by sequence A, full; A▂ the same, with room left; ×3█ shared by 3 sequences, "
    "stored once; ~ kept: nobody's, but known should a text begin like that again; · empty; "
    "x never used."
)


def draw_text(snapshot: Snapshot) -> str:
    """The figures, the pool and the tables, each line within a terminal's width."""
    lines = [f"{marks.headline(snapshot)}."]
    lines += textwrap.wrap(marks.summary(snapshot), LINE)
    lines += ["", *_pool_lines(snapshot), ""]
    for table in snapshot.tables[: marks.MAX_TABLES]:
        lines += _table_lines(table)
    num_left_out = len(snapshot.tables) - marks.MAX_TABLES
    if num_left_out > 0:
        lines.append(f"… and {marks.counted(num_left_out, 'more sequence')}")
    return "\n".join([*lines, "", *textwrap.wrap(LEGEND, LINE)])


def _pool_lines(snapshot: Snapshot) -> list[str]:
    """Sixteen blocks a line, behind the number of the first; a count of blocks ends it."""
    lines: list[str] = []
    num_cells = 0
    for piece in marks.folded(snapshot):
        if isinstance(piece, marks.Gap):
            lines[-1] += str(piece)
            num_cells = 0
            continue
        if num_cells % CELLS == 0:
            lines.append(f"{piece.block_id:6}  ")
        num_cells += 1
        lines[-1] += f"{_sign(snapshot, piece):5}"
    return [line.rstrip() for line in lines]


def _sign(snapshot: Snapshot, block: BlockState) -> str:
    if block.kind is not BlockKind.USED:
        return marks.SIGNS[block.kind]
    return marks.who(snapshot, block.block_id) + marks.LEVELS[marks.level(snapshot, block)]


def _table_lines(table: TableState) -> list[str]:
    head = f"{marks.letter(table.row)}  {marks.shortened(marks.title(table), 40)}: "
    head += f"{marks.counted(table.num_computed_tokens, 'token')} in "
    head += marks.counted(len(table.block_ids), "block")
    words = marks.words(table, LINE - len(head) - 4)
    if words:
        head += f'  "{words}"'
    first, num_left_out, last = marks.shown_entries(table.block_ids, marks.MAX_ENTRIES)
    entries = " ".join(map(str, first))
    if num_left_out:
        entries += f" …{num_left_out:,} more… " + " ".join(map(str, last))
    return [head, *textwrap.wrap(entries, LINE, initial_indent="   ", subsequent_indent="   ")]
