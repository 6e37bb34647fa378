"""The picture of the pool: true to the snapshot, well-formed, and safe whatever a caller sent."""

import collections
import random
from xml.etree import ElementTree

import pytest

import jpaged
from jpaged import marks
from jpaged.marks import Gap, folded, letter
from jpaged.scheduler import Scheduler
from jpaged.snapshot import BlockKind, BlockState, Snapshot, TableState, take_snapshot
from tests.host.scripted import make_request, make_scheduler, run_to_end, step

HOSTILE = "</style></div><script>alert(1)</script> & \"'\x1b[31m\x00\ud800\u202e\n<img onerror='x'>"


def busy_scheduler(num_requests: int = 4) -> Scheduler:
    """One request with three answers, others alone, and blocks kept from one that ended."""
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=9, max_num_batched_tokens=99)
    scheduler.add(make_request("early", 17, max_tokens=1))
    run_to_end(scheduler)
    scheduler.add(make_request("trio", 30, n=3, max_tokens=20))
    for index in range(num_requests):
        scheduler.add(make_request(f"r{index}", 3 + 5 * index, max_tokens=20))
    for _ in range(4):
        step(scheduler)
    return scheduler


def parsed(html: str) -> ElementTree.Element:
    """The piece as a tree; it must be encodable too, since a notebook is a file."""
    html.encode()
    return ElementTree.fromstring(html)


def texts_of(root: ElementTree.Element, name: str) -> list[str]:
    return ["".join(e.itertext()) for e in root.iter() if e.get("class") == name]


def test_every_block_and_every_entry_of_a_table_is_drawn():
    snapshot = take_snapshot(busy_scheduler())
    root = parsed(jpaged.show(snapshot)._repr_html_())
    cells = texts_of(root, "c")
    captions = [f"{b.block_id}{marks.who(snapshot, b.block_id)}" for b in snapshot.blocks]
    assert cells[: len(captions)] == captions
    assert len(cells) == len(captions) + 6  # the legend's
    pills = [letter(t.row) + "".join(map(str, t.block_ids)) for t in snapshot.tables]
    assert "".join(texts_of(root, "k")) == "".join(pills)
    assert "answer 2 of 3" in "".join(texts_of(root, "n"))
    hints = [e.get("title", "") for e in root.iter() if e.get("class") == "c"]
    assert "block 0: never used" in hints
    assert sum("in the table of" in hint for hint in hints) == snapshot.count(BlockKind.USED)
    assert sum("kept, with 8 of 8" in hint for hint in hints) == snapshot.count(BlockKind.CACHED)


def test_the_height_of_a_fill_is_the_share_of_the_block_that_holds_tokens():
    snapshot = take_snapshot(busy_scheduler())
    root = parsed(jpaged.show(snapshot)._repr_html_())
    styles = [e.get("style", "") for e in root.iter() if e.get("style", "").startswith("height")]
    used = [block for block in snapshot.blocks if block.kind is BlockKind.USED]
    for block, style in zip(used, styles, strict=False):
        assert style.startswith(f"height:{100 * block.num_tokens / 8:.0f}%")


def test_what_a_caller_sent_is_only_ever_text():
    scheduler = make_scheduler()
    request = make_request("x", 9)
    request.request_id, request.prompt = HOSTILE, HOSTILE
    scheduler.add(request)
    step(scheduler)
    picture = jpaged.show(scheduler)
    html = picture._repr_html_()
    root = parsed(html)
    assert {e.tag for e in root.iter()} == {"div", "span", "style", "b"}
    assert not {name for e in root.iter() for name in e.attrib} - {"class", "style", "title"}
    assert "<script" not in html
    assert "alert(1)" in "".join(texts_of(root, "n"))
    for shown in (html, str(picture)):
        assert not {"\x1b", "\x00", "\ud800", "\u202e"} & set(shown)


def test_the_picture_asks_for_nothing_outside_itself():
    html = jpaged.show(busy_scheduler())._repr_html_()
    for sign in ("http", "url(", "@import", "src=", "href=", "<script"):
        assert sign not in html


def test_a_terminal_gets_lines_that_fit_and_name_every_block_id():
    scheduler = busy_scheduler()
    shown = str(jpaged.show(scheduler))
    assert shown == repr(jpaged.show(scheduler))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 96
    for sequence in scheduler.running:
        assert "   " + " ".join(map(str, sequence.block_ids)) in lines
    assert "×3█" in shown
    assert "39 blocks of 8 tokens: " in lines[0]


def test_the_same_pool_is_drawn_the_same_and_a_sequence_keeps_its_letter():
    scheduler = busy_scheduler()
    assert jpaged.show(scheduler)._repr_html_() == jpaged.show(scheduler)._repr_html_()
    rows = {t.request_id: t.row for t in take_snapshot(scheduler).tables}
    scheduler.abort("trio")
    step(scheduler)
    for table in take_snapshot(scheduler).tables:
        assert table.row == rows[table.request_id]


def test_letters_go_on_after_z():
    assert [letter(row) for row in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]


def test_an_idle_pool_and_one_block_are_drawn():
    for scheduler in (make_scheduler(), make_scheduler(num_blocks=2)):
        picture = jpaged.show(scheduler)
        parsed(picture._repr_html_())
        assert "0 sequences running" in str(picture)


def large_snapshot(rng: random.Random, num_blocks: int, num_tables: int) -> Snapshot:
    """A pool as it may look: blocks at random, some neighbours of one owner, some kept."""
    kinds = [BlockKind.FREE, BlockKind.CACHED, BlockKind.USED]
    blocks = [BlockState(0, BlockKind.NULL, 0, 0, ())]
    while len(blocks) < num_blocks:
        kind, owner = rng.choice(kinds), rng.randrange(num_tables)
        for _ in range(min(rng.choice([1, 2, 300]), num_blocks - len(blocks))):
            used = kind is BlockKind.USED
            num_tokens = {BlockKind.FREE: 0, BlockKind.CACHED: 8}.get(kind, rng.choice([8, 8, 3]))
            owners = (owner,) if used else ()
            blocks.append(BlockState(len(blocks), kind, num_tokens, int(used), owners))
    ids = collections.defaultdict(list)
    for block in blocks:
        for owner in block.owners:
            ids[owner].append(block.block_id)
    tables = [
        TableState(
            request_id=f"request-{index}",
            index=0,
            num_siblings=1,
            row=index,
            prompt="once upon a time " * 1000,
            text="",
            num_prompt_tokens=1,
            num_tokens=8 * len(ids[index]),
            num_computed_tokens=8 * len(ids[index]),
            block_ids=tuple(ids[index]),
        )
        for index in range(num_tables)
    ]
    return Snapshot(block_size=8, blocks=tuple(blocks), tables=tuple(tables), num_waiting=0)


@pytest.mark.parametrize(("num_blocks", "num_tables"), [(401, 3), (12_000, 70), (100_000, 300)])
def test_a_large_pool_is_drawn_with_counts_and_stays_light(num_blocks: int, num_tables: int):
    snapshot = large_snapshot(random.Random(num_blocks), num_blocks, num_tables)
    pieces = folded(snapshot)
    assert len(pieces) <= marks.MAX_CELLS
    counts = collections.Counter()
    for piece in pieces:
        counts.update(piece.counts if isinstance(piece, Gap) else [piece.kind])
    assert counts == collections.Counter(block.kind for block in snapshot.blocks)
    picture = jpaged.show(snapshot)
    html = picture._repr_html_()
    parsed(html)
    assert len(html) < 400_000
    assert ("more sequence" in html) == (num_tables > marks.MAX_TABLES)
    assert "more sequence" in str(picture) or num_tables <= marks.MAX_TABLES


def test_a_pool_that_fits_is_not_folded():
    snapshot = take_snapshot(busy_scheduler())
    assert folded(snapshot, len(snapshot.blocks)) == list(snapshot.blocks)
    few = folded(snapshot, len(snapshot.blocks) - 1)
    assert [p for p in few if isinstance(p, Gap)] == [
        Gap({BlockKind.FREE: snapshot.count(BlockKind.FREE)})
    ]


def test_a_long_text_keeps_its_beginning_and_its_end():
    table = large_snapshot(random.Random(0), 5, 1).tables[0]
    assert marks.words(table, 20) == "once upon a time on…"
    assert len(marks.words(table, 20)) == 20


def test_only_what_holds_a_pool_can_be_shown():
    with pytest.raises(TypeError, match="expected an LLM, AsyncLLM, Scheduler or Snapshot, got 3"):
        jpaged.show(3)  # pyright: ignore[reportCallIssue, reportArgumentType]
