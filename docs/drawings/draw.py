"""Writes the drawings of the documentation into docs/images: `python docs/drawings/draw.py`."""

import json
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # run by itself, or loaded by a test

import svg

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"


def drawings() -> dict[str, str]:
    """Every drawing's text, by the name of its file."""
    return {
        "pool.svg": pool(),
        "reservation.svg": reservation(),
        "sharing.svg": sharing(),
        "steps.svg": steps(),
        "figures.svg": figures(),
    }


CELL, ROW, BOX = 46, 30, 24  # a token's width; a block's height with and without the gap below


def pool() -> str:
    """Two texts, their block tables, and where the blocks lie."""
    texts = [
        (
            "A",
            ["Once", "upon", "a", "time", "there", "lived", "a", "king", "who", "had"],
            [5, 2, 7],
        ),
        ("B", ["The", "sea", "was", "calm", "and", "the"], [3, 6]),
    ]
    num_blocks, left, right, top = 8, 20, 500, 48
    pieces = [
        svg.words(0, 18, "Two texts, 4 tokens a block", style="bold"),
        svg.words(264, 18, "Block tables", style="bold"),
        svg.words(right, 18, "The pool", style="bold"),
        svg.words(right, 36, "keys and values of these tokens", style="small"),
        svg.cross(right, top, 4 * CELL, BOX),
    ]
    numbers = range(num_blocks)
    pieces += [svg.words(right - 8, top + ROW * i + 17, str(i), anchor="end") for i in numbers]
    pieces += [_slots(right, top + ROW * block) for block in range(1, num_blocks)]
    y = top
    for index, (name, tokens, table) in enumerate(texts):
        pieces.append(svg.words(0, y + 17, name, style="bold"))
        for column, block in enumerate(table):
            here, there = y + ROW * column, top + ROW * block
            part = tokens[4 * column : 4 * column + 4]
            pieces += [_slots(left, here), _tokens(left, here, part, index)]
            pieces.append(_tokens(right, there, part, index))
            pieces.append(_pill(276, here, str(block), index))
            middle = BOX / 2
            pieces.append(
                svg.arrow(320, here + middle, right - 22, there + middle, stroke=svg.color(index))
            )
        y += ROW * (len(table) + 1)
    last = top + ROW * num_blocks
    pieces.append(svg.words(right, last + 12, "0: padding's own, never given out.", style="small"))
    pieces.append(svg.words(right, last + 29, "1 and 4: empty, anyone's next.", style="small"))
    title = "Two texts in blocks of four tokens; their block tables say where each block lies."
    return svg.drawing("pool", title, last + 36, pieces)


def reservation() -> str:
    """The same memory, reserved for the longest answer and cut into blocks."""
    unit, row, length = 26, 34, 24  # pixels a token, a slab's height, tokens a slab
    slabs = [9, 5, 14]
    paged = [9, 5, 14, 7, 6, 11, 7]
    block_size = 4
    pieces = [
        svg.words(0, 18, "One slab for each sequence, as long as the longest answer", style="bold"),
    ]
    y = 30
    for index, held in enumerate(slabs):
        pieces.append(svg.words(0, y + 17, "ABC"[index], style="bold"))
        pieces.append(svg.box(20, y, unit * length, BOX, fill="url(#reservation-kept)"))
        pieces.append(svg.box(20, y, unit * held, BOX, fill=svg.color(index)))
        pieces.append(svg.words(28, y + 17, f"{held} tokens", style="ink"))
        y += row
    pieces.append(
        svg.words(20, y + 12, "3 sequences run. Hatched: reserved, and empty.", style="small")
    )
    y += 52
    pieces.append(svg.words(0, y, "The same memory in blocks of 4 tokens", style="bold"))
    y += 12
    owners = [
        (index, min(block_size, held - start))
        for index, held in enumerate(paged)
        for start in range(0, held, block_size)
    ]
    per_row = length // block_size
    for place in range(len(slabs) * per_row):
        x, top = 20 + unit * block_size * (place % per_row), y + row * (place // per_row)
        pieces.append(svg.box(x, top, unit * block_size - 4, BOX))
        if place < len(owners):
            index, held = owners[place]
            width = (unit * block_size - 4) * held / block_size
            pieces.append(svg.box(x, top, width, BOX, fill=svg.color(index)))
            name, style = "ABCDEFG"[index], svg.ink(index)
            pieces.append(svg.words(x + 8, top + 17, name, style=f"{style} bold"))
    y += row * len(slabs)
    more = f"{len(paged)} sequences run. Unfilled is the rest of each one's last block."
    pieces.append(svg.words(20, y + 12, more, style="small"))
    title = "The same memory holds three sequences in slabs and seven in blocks."
    return svg.drawing("reservation", title, y + 22, pieces)


def sharing() -> str:
    """Two answers to one prompt, before and after the first of them writes."""
    pieces = []
    panels = [
        ("1. One prompt, two answers", [4, 1, 6], [4, 1, 6], {4: "AB", 1: "AB", 6: "AB"}),
        ("2. Each has written a token", [4, 1, 6], [4, 1, 3], {4: "AB", 1: "AB", 6: "A", 3: "B"}),
    ]
    for panel, (head, table_a, table_b, owners) in enumerate(panels):
        left = 376 * panel
        pieces.append(svg.words(left, 18, head, style="bold"))
        for index, table in enumerate([table_a, table_b]):
            y = 34 + 32 * index
            pieces.append(svg.words(left, y + 17, f"{'AB'[index]}'s table", style="small"))
            pieces += [
                _pill(left + 66 + 46 * column, y, str(block), index)
                for column, block in enumerate(table)
            ]
        pieces.append(svg.words(left, 128, "The pool", style="small"))
        for block in range(8):
            x, y = left + 42 * block, 138
            who = owners.get(block, "")
            pieces.append(svg.words(x + 2, y + 12, str(block), style="small"))
            if len(who) > 1:
                pieces.append(svg.words(x + 36, y + 12, "×2", style="small bold", anchor="end"))
            elif who:
                pieces.append(svg.words(x + 36, y + 12, who, style="small bold", anchor="end"))
            pieces.append(_block(x, y + 18, who, partly=block in (6, 3), is_null=block == 0))
    notes = [
        "The prompt has 10 tokens: blocks 4 and 1 are full,",
        "6 holds two of its four. All three are stored once.",
        "B was the first to write into 6, so it got a copy in 3.",
        "The full blocks stay shared to the end.",
    ]
    for place, note in enumerate(notes):
        pieces.append(svg.words(376 * (place // 2), 220 + 18 * (place % 2), note, style="small"))
    title = "Two answers to one prompt share its blocks; who first writes into one gets a copy."
    return svg.drawing("sharing", title, 246, pieces)


def steps() -> str:
    """How steps share a budget of tokens among prompts and answers."""
    budget, unit, width, gap, top = 8, 22, 78, 28, 50
    plan = [  # tokens of A, B, C, D in each step
        [("A", 6), ("B", 2)],
        [("A", 1), ("B", 7)],
        [("A", 1), ("B", 1), ("C", 5)],
        [("A", 1), ("B", 1), ("C", 1)],
        [("B", 1), ("C", 1), ("D", 6)],
        [("B", 1), ("C", 1), ("D", 3)],
    ]
    floor = top + budget * unit
    pieces = [svg.words(0, 18, "Tokens computed in each step", style="bold")]
    for number, rows in enumerate(plan):
        x, y = 64 + (width + gap) * number, floor
        for name, tokens in rows:
            index = "ABCD".index(name)
            y -= tokens * unit
            pieces.append(svg.box(x, y + 1, width, tokens * unit - 2, fill=svg.color(index)))
            middle = y + tokens * unit / 2 + 5
            label = f"{name}, {tokens}" if tokens > 1 else name
            pieces.append(svg.words(x + 8, middle, label, style=f"{svg.ink(index)} bold"))
        pieces.append(svg.words(x + width / 2, floor + 20, f"step {number + 1}", anchor="middle"))
    pieces.append(svg.line(52, floor, svg.WIDTH, floor))
    pieces.append(svg.line(52, top, svg.WIDTH, top, dash="5 4"))
    pieces.append(svg.words(0, top + 5, "budget"))
    notes = [
        "A band of one token is an answer that grows; a taller one is a piece of a prompt.",
        "In step 5 A has ended: its blocks are free, and D starts in the same step.",
    ]
    pieces += [
        svg.words(0, floor + 48 + 18 * i, note, style="small") for i, note in enumerate(notes)
    ]
    title = "Six steps; answers take one token each, prompts take what is left of the budget."
    return svg.drawing("steps", title, floor + 76, pieces)


def figures() -> str:
    """What was measured: equal bytes, equal batch, one user."""
    sides = _newest("throughput")["sides"]
    rates = {name: side["tokens_per_s"] for name, side in sides.items()}
    steps_of = _newest("step")["results"]
    by_shape = {(row["batch"], row["context"]): 1 / row["ratio"] for row in steps_of}
    groups = [
        (
            "Equal bytes of keys and values, tokens/s (two CPU cores)",
            [
                ("2048 tokens reserved a row", rates["paged"] / rates["unpaged"]),
                ("768 tokens reserved a row", rates["paged"] / rates["unpaged tight"]),
                ("2048, plain XLA on both sides", rates["paged xla"] / rates["unpaged"]),
            ],
        ),
        (
            "Equal batch, one decode step (two CPU cores)",
            [("8 rows of 300 tokens", by_shape[8, 300])],
        ),
        (
            "One user, one decode step (two CPU cores)",
            [("1 row of 300 tokens", by_shape[1, 300])],
        ),
    ]
    left, unit, row, y = 224, 142, 32, 6
    pieces = []
    for group, (head, bars) in enumerate(groups):
        y += 20
        pieces.append(svg.words(0, y, head, style="bold"))
        y += 10
        for name, ratio in bars:
            end = left + unit * ratio
            pieces.append(svg.words(left - 10, y + 17, name, anchor="end"))
            pieces.append(svg.box(left, y, unit * ratio, BOX, fill=svg.color((1, 0, 2)[group])))
            pieces.append(svg.words(end + 8, y + 17, f"{ratio:.2f}×", style="bold"))
            y += row
    one = left + unit
    pieces.append(svg.line(one, 40, one, y, dash="5 4"))
    pieces.append(svg.words(one, y + 16, "1: as fast as unpaged", style="small", anchor="middle"))
    title = "Speed of paged over unpaged: up to three times in equal bytes, about one for one user."
    return svg.drawing("figures", title, y + 24, pieces)


def _newest(benchmark: str) -> dict:
    """Its last result on a CPU in float32: names of files begin with dates."""
    last = max(RESULTS.glob(f"*-cpu-{benchmark}.json"))
    return json.loads(last.read_text(encoding="utf-8"))


def _slots(x: float, y: float) -> str:
    """An empty block of four slots."""
    return "".join(svg.box(x + CELL * i, y, CELL, BOX) for i in range(4))


def _tokens(x: float, y: float, tokens: Sequence[str], index: int) -> str:
    """Tokens in a block's first slots."""
    style = f"{svg.ink(index)} small"
    return "".join(
        svg.box(x + CELL * i, y, CELL, BOX, fill=svg.color(index))
        + svg.words(x + CELL * (i + 0.5), y + 16, token, style=style, anchor="middle")
        for i, token in enumerate(tokens)
    )


def _pill(x: float, y: float, text: str, index: int) -> str:
    """An entry of a block table."""
    style = f"{svg.ink(index)} bold"
    number = svg.words(x + 20, y + 17, text, style=style, anchor="middle")
    return svg.box(x, y, 40, BOX, fill=svg.color(index)) + number


def _block(x: float, y: float, who: str, *, partly: bool, is_null: bool) -> str:
    """A block of the pool in its owners' colours, filled from below."""
    size = 36
    if is_null:
        return svg.cross(x, y, size, size)
    filled = size * (1 if not partly else 0.5 if len(who) > 1 else 0.75)  # of four tokens
    bands = "".join(
        svg.box(
            x + size * i / len(who),
            y + size - filled,
            size / len(who),
            filled,
            fill=svg.color("AB".index(owner)),
            stroke="none",
        )
        for i, owner in enumerate(who)
    )
    return bands + svg.box(x, y, size, size)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
