"""The pool drawn live in the terminal while prompts are generated: `jpaged top`."""

import itertools
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jpaged import marks
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.snapshot import BlockKind, BlockState, Snapshot

PER_SECOND = 8  # drawings: more than the eye needs, few beside the steps
MAX_ROWS = 12  # sequences that are listed
STYLES = {BlockKind.NULL: "dim", BlockKind.FREE: "dim", BlockKind.CACHED: "white"}


def run(
    llm: LLM,
    prompts: Sequence[str],
    params: Sequence[SamplingParams],
    *,
    at_once: int,
    console: Console | None = None,
) -> None:
    """Generates all prompts, at most `at_once` requests at a time, and draws each step's pool."""
    waiting = iter(zip(prompts, params, strict=True))
    start, drawn = time.perf_counter(), 0.0
    with Live(console=console, auto_refresh=False) as live:
        for prompt, one in itertools.islice(waiting, at_once):
            llm.submit(prompt, one)
        while llm.has_unfinished_requests:
            ended = sum(output.finished for output in llm.step())
            for prompt, one in itertools.islice(waiting, ended):
                llm.submit(prompt, one)
            now = time.perf_counter()
            if now - drawn >= 1 / PER_SECOND:
                live.update(draw(llm, now - start), refresh=True)
                drawn = now
        live.update(draw(llm, time.perf_counter() - start), refresh=True)


def draw(llm: LLM, seconds: float) -> Group:
    """The figures, the pool and the first sequences, after so many seconds."""
    snapshot, stats = llm.snapshot(), llm.stats()
    figures = Text(
        f"{marks.headline(snapshot)}. {stats.generated_tokens} tokens in {seconds:.1f} s, "
        f"{stats.generated_tokens / max(seconds, 1e-9):.0f} a second; "
        f"prefix hits {100 * stats.hit_rate:.0f} %; {stats.preemptions} preemptions"
    )
    return Group(figures, Text(), _pool(snapshot), Text(), _sequences(snapshot))


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


def _sequences(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "tokens", "blocks", "its text so far"):
        table.add_column(name, no_wrap=True, justify="right" if name[:1] in "tb" else "left")
    for one in snapshot.tables[:MAX_ROWS]:
        table.add_row(
            Text(marks.letter(one.row), style=marks.color(one.row)),
            str(one.num_computed_tokens),
            str(len(one.block_ids)),
            Text(marks.words(one, 60)),
        )
    left_out = len(snapshot.tables) - MAX_ROWS
    if left_out > 0:
        table.add_row("…", "", "", f"and {marks.counted(left_out, 'more sequence')}")
    return table
