"""The pool drawn live in the terminal while prompts are generated: `jpaged top`."""

import contextlib
import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jpaged import marks
from jpaged.llm import LLM
from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState
from jpaged.top_load import Load

PER_SECOND = 8  # drawings: more than the eye needs, few beside the steps
MAX_ROWS = 12  # sequences that are listed
LETTER_WIDTH, FIGURE_WIDTH, PADDING = 2, 6, 2  # of the columns beside the text, and between them
MIN_TEXT_WIDTH = 10
ECHO_WIDTH = 3  # left for the terminal's ^C, which would begin a line that nobody counts
STYLES = {BlockKind.NULL: "dim", BlockKind.FREE: "dim", BlockKind.CACHED: "white"}


def run(llm: LLM, load: Load, *, at_once: int, console: Console | None = None) -> None:
    """Generates the load, at most `at_once` requests at a time, and draws the pool meanwhile.

    Ctrl-C ends it; the last drawing stays.
    """
    titles: dict[str, str] = {}
    start, drawn = time.perf_counter(), 0.0
    with _noted_interrupt() as interrupt, Live(console=console, auto_refresh=False) as live:
        _submit(llm, load, at_once, titles)
        while llm.has_unfinished_requests and not interrupt.is_set():
            ended = [output.request_id for output in llm.step() if output.finished]
            for request_id in ended:
                del titles[request_id]
            _submit(llm, load, len(ended), titles)
            now = time.perf_counter()
            if now - drawn >= 1 / PER_SECOND:
                live.update(draw(llm, now - start, live.console, titles), refresh=True)
                drawn = now
        live.update(draw(llm, time.perf_counter() - start, live.console, titles), refresh=True)


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which so cuts no drawing short; a second one interrupts as ever.

    For the main thread, which alone may ask for it.
    """
    noted = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _submit(llm: LLM, load: Load, count: int, titles: dict[str, str]) -> None:
    for question, params in itertools.islice(load, count):
        titles[llm.submit(question.prompt, params)] = question.title


def draw(llm: LLM, seconds: float, console: Console, titles: Mapping[str, str]) -> Group:
    """The figures, the pool and the first sequences, after so many seconds.

    As many sequences as the console has lines for; `titles` are shown instead of prompts.
    """
    snapshot, stats = llm.snapshot(), llm.stats()
    figures = Text(
        f"{marks.headline(snapshot)}. {stats.generated_tokens} tokens in {seconds:.1f} s, "
        f"{stats.generated_tokens / max(seconds, 1e-9):.0f} a second; "
        f"prefix hits {100 * stats.hit_rate:.0f} %; "
        f"{marks.counted(stats.preemptions, 'preemption')}"
    )
    above = Group(figures, Text(), _pool(snapshot), _key(), Text())
    num_lines = console.height - len(console.render_lines(above))
    # Beside them there are the heading, what is left out, and the cursor's own line at the end.
    num_rows = min(max(num_lines - 3, 1), MAX_ROWS)
    room = console.width - LETTER_WIDTH - 2 * FIGURE_WIDTH - 3 * PADDING - ECHO_WIDTH
    return Group(above, _sequences(snapshot, titles, num_rows, max(room, MIN_TEXT_WIDTH)))


def _pool(snapshot: Snapshot) -> Text:
    """A sign a block: how full it is, in its first owner's colour."""
    text = Text()
    for piece in marks.folded(snapshot):
        if isinstance(piece, marks.Gap):
            text.append(f" {piece} ", style="dim")
        else:
            text.append(_sign(snapshot, piece), style=_style(snapshot, piece))
    return text


def _sign(snapshot: Snapshot, block: BlockState) -> str:
    if block.kind is not BlockKind.USED:
        return marks.SIGNS[block.kind]
    return marks.LEVELS[max(1, marks.level(snapshot, block))]


def _style(snapshot: Snapshot, block: BlockState) -> str:
    if block.kind is not BlockKind.USED:
        return STYLES[block.kind]
    rows = marks.rows_of(snapshot, block.block_id)
    return marks.color(rows[0]) + (" underline" if len(rows) > 1 else "")


def _key() -> Text:
    """What the signs mean."""
    signs = marks.SIGNS
    text = Text(f"{marks.LEVELS[1]}{marks.LEVELS[4]}{marks.LEVELS[8]} in use, ", style="dim")
    text.append("underlined", style="underline")
    return text.append(
        f": shared; {signs[BlockKind.CACHED]} kept; {signs[BlockKind.FREE]} empty; "
        f"{signs[BlockKind.NULL]} padding"
    )


def _sequences(snapshot: Snapshot, titles: Mapping[str, str], num_rows: int, room: int) -> Table:
    """The first sequences, a line each, with `room` characters for what each has written."""
    table = Table(box=None, pad_edge=False, padding=(0, PADDING, 0, 0))
    table.add_column("", min_width=LETTER_WIDTH, no_wrap=True)
    for name in ("tokens", "blocks"):
        table.add_column(name, min_width=FIGURE_WIDTH, no_wrap=True, justify="right")
    table.add_column("its text so far", overflow="ellipsis")
    for one in snapshot.tables[:num_rows]:
        table.add_row(
            Text(marks.letter(one.row), style=marks.color(one.row)),
            str(one.num_computed_tokens),
            str(len(one.block_ids)),
            Text(_words(one, titles, room), no_wrap=True),
        )
    left_out = len(snapshot.tables) - num_rows
    if left_out > 0:
        table.add_row("…", "", "", f"and {marks.counted(left_out, 'more sequence')}")
    return table


def _words(table: TableState, titles: Mapping[str, str], most: int) -> str:
    title = titles.get(table.request_id)
    return marks.words(table if title is None else dataclasses.replace(table, prompt=title), most)
