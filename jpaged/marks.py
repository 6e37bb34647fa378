"""What every drawing of the pool agrees on: names, colours, words, and which blocks to draw."""

import collections
import itertools
import string
from collections.abc import Sequence
from typing import NamedTuple

from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState

# Okabe and Ito's colours, which colour-blind people can tell apart; black is kept for words.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#F0E442", "#D55E00")
SIGNS = {BlockKind.NULL: "x", BlockKind.FREE: "·", BlockKind.CACHED: "~"}
LEVELS = " ▁▂▃▄▅▆▇█"  # of a block in use, from empty to full
NUM_TEXTURES = 3  # plain, striped, dotted: beyond 21 sequences the letters alone tell them apart
MAX_CELLS = 400  # a page's worth; what is beyond it is counted
MAX_TABLES = 64
FEW_TABLES = 16  # so many have room for their text and for long tables
MAX_ENTRIES = 40  # of one table
MAX_ENTRIES_OF_MANY = 9
MIN_FOLDED = 4  # neighbours that a count stands for

INTRODUCTION = (
    "For every token that it has read or written the model keeps a piece of memory, the token's "
    "keys and values. All of them lie in one pool, cut into blocks of equal size. A sequence (a "
    "text that is being written) takes another block when its last one is full, from wherever one "
    "is free; its block table lists its blocks in the order of the text."
)


class Gap(NamedTuple):
    """Neighbouring blocks that are counted instead of drawn; `rows` hold all of them, if any do."""

    counts: dict[BlockKind, int]
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        more = "more of " + ", ".join(map(letter, self.rows)) if self.rows else "in use"
        if len(self.rows) > 1:
            more = f"more ×{len(self.rows)}"
        names = {BlockKind.USED: more, BlockKind.CACHED: "kept", BlockKind.FREE: "empty"}
        parts = [f"{self.counts[k]:,} {name}" for k, name in names.items() if self.counts.get(k)]
        return f"… {', '.join(parts)} …"


class Entries(NamedTuple):
    """A block table as it is drawn: what is left out is counted."""

    first: Sequence[int]
    num_left_out: int
    last: Sequence[int]


def folded(snapshot: Snapshot, max_cells: int = MAX_CELLS) -> list[BlockState | Gap]:
    """The blocks in order, at most `max_cells` things: runs of empty ones give way first.

    Then kept ones do, then full ones of one owner behind the first, at last whatever comes late.
    """
    pieces: list[BlockState | Gap] = list(snapshot.blocks)
    for kinds in itertools.accumulate(([BlockKind.FREE], [BlockKind.CACHED], [BlockKind.USED])):
        if len(pieces) > max_cells:
            pieces = _fold(snapshot, kinds)
    if len(pieces) <= max_cells:
        return pieces
    counts: collections.Counter[BlockKind] = collections.Counter()
    for piece in pieces[max_cells - 1 :]:
        counts.update(piece.counts if isinstance(piece, Gap) else [piece.kind])
    return [*pieces[: max_cells - 1], Gap(dict(counts))]


def _fold(snapshot: Snapshot, kinds: Sequence[BlockKind]) -> list[BlockState | Gap]:
    def group(block: BlockState) -> tuple[int, ...] | None:
        """Equal for neighbours that may be folded together; None where a block stays."""
        is_partial = block.kind is BlockKind.USED and block.num_tokens < snapshot.block_size
        return None if block.kind not in kinds or is_partial else block.owners

    pieces: list[BlockState | Gap] = []
    for places, run in itertools.groupby(snapshot.blocks, key=group):
        found = list(run)
        num_kept = bool(places)  # the first of an owner's blocks shows whose the rest are
        if places is None or len(found) < MIN_FOLDED + num_kept:
            pieces += found
            continue
        rows = tuple(snapshot.tables[place].row for place in places)
        counts = collections.Counter(block.kind for block in found[num_kept:])
        pieces += [*found[:num_kept], Gap(dict(counts), rows)]
    return pieces


def shown_entries(block_ids: Sequence[int], most: int) -> Entries:
    """All of a table's blocks, or the first and the last where there are more than `most`."""
    if len(block_ids) <= most:
        return Entries(block_ids, 0, ())
    num_last = most // 4
    num_first = most - num_last - 2  # the count takes the place of two
    num_left_out = len(block_ids) - num_first - num_last
    return Entries(block_ids[:num_first], num_left_out, block_ids[-num_last:])


def letter(row: int) -> str:
    """A sequence's name in a drawing, the same as long as it runs: A to Z, then AA, AB, ..."""
    letters = string.ascii_uppercase
    head = letter(row // len(letters) - 1) if row >= len(letters) else ""
    return head + letters[row % len(letters)]


def color(row: int) -> str:
    """A sequence's colour."""
    return COLORS[row % len(COLORS)]


def texture(row: int) -> int:
    """Which texture tells a sequence from others of its colour: 0 is plain."""
    return row // len(COLORS) % NUM_TEXTURES


def rows_of(snapshot: Snapshot, block_id: int) -> list[int]:
    """The rows of the sequences that hold a block."""
    return [snapshot.tables[place].row for place in snapshot.blocks[block_id].owners]


def who(snapshot: Snapshot, block_id: int) -> str:
    """A block's owner, the number of them, or nothing."""
    count = snapshot.blocks[block_id].ref_count
    return f"×{count}" if count > 1 else "".join(map(letter, rows_of(snapshot, block_id)))


def level(snapshot: Snapshot, block: BlockState) -> int:
    """How full it is, of LEVELS; a single token is seen."""
    return -(-block.num_tokens * (len(LEVELS) - 1) // snapshot.block_size)


def headline(snapshot: Snapshot) -> str:
    """The pool in one line."""
    kinds = {"in use": BlockKind.USED, "kept": BlockKind.CACHED, "empty": BlockKind.FREE}
    parts = ", ".join(f"{snapshot.count(kind):,} {name}" for name, kind in kinds.items())
    parts = parts.replace("in use", f"in use ({snapshot.num_shared:,} shared)", 1)
    num_blocks = counted(len(snapshot.blocks) - 1, "block")
    return f"{num_blocks} of {snapshot.block_size} tokens: {parts}"


def summary(snapshot: Snapshot) -> str:
    """Who runs and waits, and what paging spares them."""
    running = (
        f"{counted(len(snapshot.tables), 'sequence')} running, {snapshot.num_waiting:,} waiting."
    )
    if not snapshot.tables:
        return running
    return (
        f"{running} {snapshot.waste:.1%} of the memory in use holds nothing yet (waste); "
        f"sharing saves {snapshot.saving:.1%} of the blocks in the tables."
    )


def title(table: TableState) -> str:
    """Which answer to which request a sequence is."""
    sibling = f", answer {table.index + 1} of {table.num_siblings}"
    return f"request {_name(table)}{sibling if table.num_siblings > 1 else ''}"


def short_title(table: TableState) -> str:
    """The same where there is little room."""
    sibling = f" ({table.index + 1}/{table.num_siblings})" if table.num_siblings > 1 else ""
    return f"request {_name(table)}{sibling}"


def _name(table: TableState) -> str:
    return shortened(clean(str(table.request_id)), 60)


def words(table: TableState, most: int) -> str:
    """The prompt's beginning and the answer's end, in at most `most` characters; may be empty."""
    prompt, text = table.prompt or "", table.text
    if not text or len(prompt) + len(text) <= most:
        return shortened(clean(prompt[: most + 1] + text), most)
    num_tail = min(len(text), most // 2)
    head = clean(prompt[:most] + text[:most])[: most - num_tail - 3]
    return f"{head.rstrip()} … {clean(text[-num_tail:]).lstrip()}"


def clean(text: str) -> str:
    """The text with a space for all that is no visible character: line ends, escapes, halves."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str, most: int) -> str:
    """The text's beginning, in at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(number: int, thing: str) -> str:
    """The number and the thing, in the plural where there is not one."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
