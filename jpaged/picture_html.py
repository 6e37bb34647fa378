"""A snapshot as a piece of HTML: no scripts, nothing to load, and well-formed XML.

Words take the page's own colour, and stand beside the boxes or on one plain colour, never on a
half-filled box: so they can be read on light and dark pages alike.
"""

import html
from collections.abc import Sequence

from jpaged import marks
from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState

MAX_BANDS = 4  # colours in a shared block; its count says the rest
TEXTURES = (
    "",
    "repeating-linear-gradient(45deg,#fffb 0 2px,#fff0 2px 6px)",
    "radial-gradient(#fff 1.2px,#fff0 1.7px) 0 0/5px 5px",
)
KEPT = "repeating-linear-gradient(135deg,#888b 0 1px,#8880 1px 4px)"
CROSS = (
    "linear-gradient(to top right,#0000 48%,#888 48% 52%,#0000 52%),"
    "linear-gradient(to bottom right,#0000 48%,#888 48% 52%,#0000 52%)"
)
STYLE = """
.jpaged{font:13px/1.4 system-ui,-apple-system,'Segoe UI',sans-serif;max-width:980px;color:inherit}
.jpaged div{box-sizing:border-box}
.jpaged .h{font-size:14px;font-weight:600;margin:10px 0 2px}
.jpaged .m{opacity:.8;margin:2px 0 6px}
.jpaged .two{display:flex;flex-wrap:wrap;gap:4px 28px;align-items:flex-start}
.jpaged .two>div{flex:1 1 350px;min-width:0}
.jpaged .two>.u{flex-basis:450px}
.jpaged .p{display:flex;flex-wrap:wrap;gap:5px 4px;align-items:flex-end}
.jpaged .c{flex:none;width:var(--w,34px)}
.jpaged .c>span{display:flex;justify-content:space-between;padding:0 1px;font-size:9.5px;
line-height:12px;white-space:nowrap}
.jpaged .g{font-size:11px;line-height:22px;opacity:.8;white-space:nowrap;padding:0 6px}
.jpaged .b{height:22px;border:1px solid #888;border-radius:3px;display:flex;flex-direction:column;
justify-content:flex-end;overflow:hidden}
.jpaged .e{border-color:#8886}
.jpaged .t{margin:0 0 9px}
.jpaged .l{display:flex;gap:7px;align-items:center;white-space:nowrap}
.jpaged .l>*{flex:none}
.jpaged .l>.n{flex:0 1 auto;font-weight:600;overflow:hidden;text-overflow:ellipsis}
.jpaged .q{opacity:.8;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.jpaged .r{display:flex;flex-wrap:wrap;gap:2px;font-size:11px;line-height:16px}
.jpaged .t .r{margin-top:2px}
.jpaged .k{display:flex;min-width:16px;padding:0 3px;border-radius:3px;justify-content:center;
font-weight:600;overflow:hidden}
.jpaged .k i{width:8px;margin:0 3px 0 -3px}
.jpaged .k i+i{margin-left:-3px}
.jpaged .l>.k,.jpaged .many>.k{font-size:11px;line-height:16px;min-width:20px}
.jpaged .s{opacity:.8;padding:0 2px}
.jpaged .many{display:grid;grid-template-columns:32px minmax(40px,84px) 86px minmax(0,1fr);
gap:0 7px;align-items:center;margin-bottom:3px}
.jpaged .y{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:6px 24px;
margin-top:6px}
.jpaged .y>div{display:flex;gap:9px;align-items:center}
"""


def draw_html(snapshot: Snapshot) -> str:
    """One `div` with the figures, the pool beside the tables, and what the marks mean."""
    return (
        f'<div class="jpaged"><style>{STYLE}</style>'
        f'<div class="m">{html.escape(marks.INTRODUCTION)}</div>'
        f'<div class="two"><div><div class="h">The pool</div>{_pool(snapshot)}</div>'
        f'<div class="u"><div class="h">The block tables</div>{_tables(snapshot)}</div></div>'
        f'<div class="h">What the marks mean</div>{_legend()}</div>'
    )


def _pool(snapshot: Snapshot) -> str:
    pieces = marks.folded(snapshot)
    drawn = [piece for piece in pieces if isinstance(piece, BlockState)]
    longest = max(len(f"{b.block_id}{marks.who(snapshot, b.block_id)}") for b in drawn)
    cells = "".join(
        f'<div class="g">{piece}</div>' if isinstance(piece, marks.Gap) else _cell(snapshot, piece)
        for piece in pieces
    )
    return (
        f'<div class="m">{marks.headline(snapshot)}.</div>'
        f'<div class="p" style="--w:{max(34, 7 * longest + 2)}px">{cells}</div>'
    )


def _cell(snapshot: Snapshot, block: BlockState) -> str:
    rows = marks.rows_of(snapshot, block.block_id)
    holds = f"{block.num_tokens} of {snapshot.block_size} tokens"
    hint = {
        BlockKind.NULL: "never used",
        BlockKind.FREE: "empty",
        BlockKind.CACHED: f"kept, with {holds}",
        BlockKind.USED: f"{holds}, in the table of {', '.join(map(marks.letter, rows))}",
    }[block.kind]
    box = _box(block.kind, rows, share=block.num_tokens / snapshot.block_size)
    number, who = str(block.block_id), marks.who(snapshot, block.block_id)
    return f'<div class="c" title="block {number}: {hint}">{_caption(number, who)}{box}</div>'


def _caption(number: str, who: str) -> str:
    return f"<span><span>{number}</span><b>{who}</b></span>"


def _box(kind: BlockKind, rows: Sequence[int], *, share: float = 1.0) -> str:
    if kind is BlockKind.FREE:
        return '<div class="b e"></div>'
    if kind is not BlockKind.USED:
        paint = KEPT if kind is BlockKind.CACHED else CROSS
        return f'<div class="b" style="background:{paint}"></div>'
    fill = f"height:{100 * share:.0f}%;background:{_paint(rows)}"
    return f'<div class="b"><div style="{fill}"></div></div>'


def _paint(rows: Sequence[int]) -> str:
    """The colour and texture of a sequence, or bands in the colours of several."""
    if len(rows) == 1:
        (row,) = rows
        return ",".join(filter(None, [TEXTURES[marks.texture(row)], marks.color(row)]))
    shown = rows[:MAX_BANDS]
    edges = [100 * i // len(shown) for i in range(len(shown) + 1)]
    bands = [f"{marks.color(r)} {edges[i]}% {edges[i + 1]}%" for i, r in enumerate(shown)]
    return f"linear-gradient(90deg,{','.join(bands)})"


def _tables(snapshot: Snapshot) -> str:
    tables = snapshot.tables[: marks.MAX_TABLES]
    draw = _table if len(snapshot.tables) <= marks.FEW_TABLES else _short_table
    parts = [f'<div class="m">{html.escape(marks.summary(snapshot))}</div>']
    parts += [draw(snapshot, table) for table in tables]
    num_left_out = len(snapshot.tables) - len(tables)
    if num_left_out:
        more = marks.counted(num_left_out, "more sequence")
        parts.append(f'<div class="m">… and {more}, not drawn.</div>')
    return "".join(parts)


def _table(snapshot: Snapshot, table: TableState) -> str:
    """Three lines: who it is, what it says, and its blocks."""
    words = html.escape(marks.words(table, 62))
    tokens = marks.counted(table.num_computed_tokens, "token")
    return (
        f'<div class="t"><div class="l">{_pill([table.row], marks.letter(table.row))}'
        f'<span class="n">{html.escape(marks.title(table))}</span>'
        f'<span class="q">{tokens} in {marks.counted(len(table.block_ids), "block")}</span></div>'
        f'<div class="q">{words}</div>{_entries(snapshot, table, marks.MAX_ENTRIES)}</div>'
    )


def _short_table(snapshot: Snapshot, table: TableState) -> str:
    """One line, or two where the table is long; the text shows under the mouse."""
    title, words = html.escape(marks.title(table)), html.escape(marks.words(table, 200))
    return (
        f'<div class="many" title="{title}: {words}">{_pill([table.row], marks.letter(table.row))}'
        f'<span class="q">{html.escape(marks.short_title(table))}</span>'
        f'<span class="q">{marks.counted(table.num_computed_tokens, "token")}</span>'
        f"{_entries(snapshot, table, marks.MAX_ENTRIES_OF_MANY)}</div>"
    )


def _entries(snapshot: Snapshot, table: TableState, most: int) -> str:
    first, num_left_out, last = marks.shown_entries(table.block_ids, most)
    gap = [f'<span class="s">… {num_left_out:,} more …</span>'] if num_left_out else []
    before, after = (
        [_pill(marks.rows_of(snapshot, block_id), str(block_id)) for block_id in block_ids]
        for block_ids in (first, last)
    )
    return f'<div class="r">{"".join([*before, *gap, *after])}</div>'


def _pill(rows: Sequence[int], text: str) -> str:
    """Words on their first owner's colour, behind a strip of its texture or the others' colours."""
    color = marks.color(rows[0])
    strip = ""
    if len(rows) > 1:
        others = rows[1:MAX_BANDS]
        strip = "".join(f'<i style="background:{marks.color(row)}"></i>' for row in others)
    elif marks.texture(rows[0]):
        strip = f'<i style="background:{TEXTURES[marks.texture(rows[0])]}"></i>'
    ink = "#fff" if color == "#0072B2" else "#000"  # the one dark colour
    return f'<span class="k" style="background:{color};color:{ink}">{strip}{text}</span>'


def _legend() -> str:
    parts = [
        f'<div><div class="c">{_caption(number, who)}{box}</div><span>{words}</span></div>'
        for number, who, box, words in LEGEND
    ]
    return f'<div class="y">{"".join(parts)}</div>'


LEGEND = (
    (
        "7",
        "A",
        _box(BlockKind.USED, [0]),
        "In use by sequence A, and full. Letter, colour and texture say whose it is; the number "
        "is its own.",
    ),
    (
        "9",
        "A",
        _box(BlockKind.USED, [0], share=0.4),
        "Partly full: A's next tokens go there. Only this room is wasted.",
    ),
    (
        "5",
        "×2",
        _box(BlockKind.USED, [0, 1]),
        "Shared: two texts begin alike, and what they have in common is stored once.",
    ),
    (
        "3",
        "",
        _box(BlockKind.CACHED, []),
        "Kept: nobody's now, but still known should a text begin like that again. Given away when "
        "no empty block is left.",
    ),
    ("4", "", _box(BlockKind.FREE, []), "Empty."),
    ("0", "", _box(BlockKind.NULL, []), "Block 0 belongs to nobody: padding is written there."),
)
