"""The memory benchmark: allocators that keep their promises, averages that count what they say."""

import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import blast as blast_module
from benchmarks import memory
from benchmarks.beam_saving import save_beams
from benchmarks.blast import BlastError, blast
from benchmarks.contiguous import Allocator, Buddies, FirstFit, Slabs, reserve
from benchmarks.lengths import LAWS, LEVELS, RequestLengths, law_lengths, read_trace
from benchmarks.moment import replay_moment
from benchmarks.order import PATIENCE
from benchmarks.plot import draw
from benchmarks.questions import QUESTIONS
from benchmarks.replay import read_prompts, replay
from benchmarks.saturate import saturate, save
from benchmarks.scripted import requests_of, run_saturated, scheduler_for
from jpaged import planner
from jpaged.snapshot import BlockKind

NUM_SLOTS = 203  # no power of two: 128 + 64 + 8 + 2 + 1


def holes(allocator: Buddies | FirstFit) -> list[tuple[int, int]]:
    if isinstance(allocator, FirstFit):
        return allocator.holes
    return [(start, size) for size, starts in allocator.free_starts.items() for start in starts]


def assert_ranges_tile_the_pool(allocator: Buddies | FirstFit) -> None:
    end = 0
    for start, size in sorted([*allocator.sizes.items(), *holes(allocator)]):
        assert start == end, f"slot {min(start, end)} is in two ranges, or in none"
        end = start + size
    assert end == NUM_SLOTS


@pytest.mark.parametrize("kind", [FirstFit, Buddies])
@settings(max_examples=150, deadline=None)
@given(operations=st.lists(st.tuples(st.booleans(), st.integers(1, 140)), max_size=60))
def test_ranges_never_overlap_and_freed_ones_merge(
    kind: type[FirstFit] | type[Buddies], operations: list[tuple[bool, int]]
):
    allocator = kind(NUM_SLOTS)
    whole = sorted(holes(allocator))
    for takes, number in operations:
        if takes:
            room = max((size for _, size in holes(allocator)), default=0)
            given = allocator.allocate(number)
            needed = number if kind is FirstFit else 1 << (number - 1).bit_length()
            assert (given is not None) == (room >= needed)
            assert given is None or given[1] == needed
        elif allocator.sizes:
            allocator.free(sorted(allocator.sizes)[number % len(allocator.sizes)])
        assert_ranges_tile_the_pool(allocator)
        if isinstance(allocator, FirstFit):
            assert all(sum(a) < b[0] for a, b in itertools.pairwise(allocator.holes))
        else:
            assert all(start % size == 0 for start, size in holes(allocator))
    for start in list(allocator.sizes):
        allocator.free(start)
    assert sorted(holes(allocator)) == whole


def test_shares_of_a_pool_that_can_be_counted_by_hand():
    # Two slabs of 6 slots; every request holds 3, 4 and 5 tokens in its three steps.
    lengths = [RequestLengths(input_tokens=3, output_tokens=3)] * 8
    shares = reserve(lengths, Slabs(13, 6), num_slots=13)
    assert shares.running == 2
    assert shares.effective == pytest.approx(8 / 13)
    assert shares.reserved == pytest.approx(4 / 13)
    assert shares.internal == 0
    assert shares.external == pytest.approx(1 / 13)


def step_by_step(
    lengths: list[RequestLengths], allocator: Allocator, num_slots: int
) -> tuple[float, float, float]:
    """What `reserve` says of effective, allocated and running, one step after the other."""
    waiting, running, samples = list(lengths), [], []
    first = finished = 0
    while waiting:
        for entry in [entry for entry in running if entry[1] == entry[0].output_tokens]:
            allocator.free(entry[2])
            running.remove(entry)
            finished += 1
        while waiting:
            given = allocator.allocate(waiting[0].input_tokens + waiting[0].output_tokens)
            if given is None:
                break
            running.append([waiting.pop(0), 0, *given])
        first = first or len(running)
        if finished >= first and waiting:
            held = sum(pair.input_tokens + age for pair, age, _, _ in running)
            samples.append((held, sum(size for *_, size in running), len(running)))
        for entry in running:
            entry[1] += 1
    held, allocated, count = (sum(column) / len(samples) for column in zip(*samples, strict=True))
    return held / num_slots, allocated / num_slots, count


def test_averages_over_spans_equal_those_of_single_steps():
    lengths = [
        pair.clipped(max_input=60, max_output=40) for pair in law_lengths("sharegpt", 90, seed=2)
    ]
    for make in (FirstFit, Buddies, lambda size: Slabs(size, 100)):
        shares = reserve(lengths, make(510), num_slots=510)
        effective, allocated, running = step_by_step(lengths, make(510), 510)
        assert shares.effective == pytest.approx(effective)
        assert 1 - shares.external == pytest.approx(allocated)
        assert shares.running == pytest.approx(running)


def test_a_saturated_pool_wastes_half_a_block_a_sequence():
    lengths = law_lengths("sharegpt", 300, seed=0)
    paged = saturate(lengths, num_slots=12_000, block_size=16)
    assert paged.waste == pytest.approx(paged.theory, rel=0.05)
    shares = paged.shares
    assert shares.effective + shares.internal + shares.external == pytest.approx(1)
    assert shares.effective == pytest.approx(paged.resident_tokens * shares.running / 12_000)
    assert shares.effective > 0.9


def test_the_counters_agree_with_the_rows_of_every_step():
    lengths = law_lengths("sharegpt", 60, seed=0)
    scheduler = scheduler_for(lengths, num_slots=6_000, block_size=16, caching=False)
    held = slots = 0
    for plan in run_saturated(scheduler, requests_of(lengths)):
        held += sum(row.seq_len for row in plan.rows)
        slots += 16 * sum(len(row.sequence.block_ids) for row in plan.rows)
    assert (scheduler.counters.held_tokens, scheduler.counters.held_slots) == (held, slots)


@pytest.mark.parametrize("n", [2, 5])
def test_siblings_save_the_whole_blocks_of_their_prompt(n: int):
    lengths = law_lengths("sharegpt", 60, seed=0)
    saving = save(lengths, n, num_slots=40_000, block_size=16)
    assert saving.measured == pytest.approx(saving.theory, abs=0.01)
    assert saving.copied_blocks > 0


def test_too_few_requests_to_fill_the_pool_are_refused():
    lengths = law_lengths("sharegpt", 10, seed=0)
    with pytest.raises(ValueError, match="10 requests do not keep 99999 slots busy"):
        saturate(lengths, num_slots=99_999, block_size=16)
    with pytest.raises(ValueError, match="10 requests do not keep 99999 slots busy"):
        reserve(lengths, FirstFit(99_999), num_slots=99_999)


@pytest.fixture
def mooncake(tmp_path) -> str:
    """Five prompts, some of which begin alike or are the same."""
    path = tmp_path / "tiny.jsonl"
    prompts = [(700, [0, 1]), (1300, [0, 2, 3]), (900, [4, 5]), (700, [0, 1]), (1300, [0, 2, 3])]
    lines = [
        {"timestamp": 0, "input_length": length, "output_length": 9, "hash_ids": hash_ids}
        for length, hash_ids in prompts
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_replayed_prompts_hit_what_an_ideal_cache_holds(mooncake: str):
    prompts = read_prompts(mooncake, 10)
    assert len(read_trace(mooncake)) == len(prompts) == 5
    hits = replay(prompts, num_blocks=None, block_size=64)
    # Whole blocks of 64: 10, 20, 14, 10, 20; cached: 0, 8, 0, 10, 20.
    assert hits.measured == hits.ideal == 38 / 74
    assert hits.ideal_pieces == 6 / 12
    small = replay(prompts, num_blocks=21, block_size=64)
    assert small.measured < hits.measured
    assert small.measured == pytest.approx(small.ideal, abs=0.02)


def test_the_moment_of_a_replay_is_one_of_its_steps():
    lengths = law_lengths("sharegpt", 40, seed=0)
    moment = replay_moment(lengths, block_size=16)
    record, snapshot = moment.steps[moment.step - 1], moment.snapshot
    assert (record["step"], record["running"]) == (moment.step, len(snapshot.tables))
    assert record["blocks_used"] == snapshot.count(BlockKind.USED)
    assert record["blocks_cached"] == snapshot.count(BlockKind.CACHED)
    assert snapshot.count(BlockKind.FREE) == 0
    assert record["saving"] == snapshot.saving > 0
    assert record["waste"] == snapshot.waste
    assert sum(record["hit_tokens"] for record in moment.steps) > 0


@pytest.mark.parametrize("num_requests", [1, 30])
def test_the_picture_is_drawn(tmp_path, num_requests: int):
    pytest.importorskip("matplotlib")
    shares = {"maximum": {"effective": 0.2, "reserved": 0.1, "internal": 0.5, "external": 0.2}}
    report = {"lengths": "a_law", "longest": 9, "waste": 0.03, "waste_theory": 0.03}
    lengths = law_lengths("sharegpt", num_requests, seed=0)
    path = tmp_path / "memory.png"
    draw([report | {"shares": shares}], replay_moment(lengths, block_size=16), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_laws_rise_and_have_a_value_for_every_level():
    for law in LAWS.values():
        for quantiles in (law.inputs, law.outputs):
            assert len(quantiles) == len(LEVELS)
            assert list(quantiles) == sorted(quantiles)


def test_the_command_ends_with_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mooncake: str
):
    command = (
        "memory --requests 150 --sharing-requests 20 --slabs 5 --parallel 3 --repeats 3 "
        "--beam-requests 4 --beam-widths 3 --order-requests 40 --load 2"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    memory.main()
    out = capsys.readouterr().out
    assert "hits is left out" in out
    report = json.loads(out.splitlines()[-1])
    assert [entry["lengths"].split()[0] for entry in report["reports"]] == list(LAWS)
    for entry in report["reports"]:
        effective = {name: shares["effective"] for name, shares in entry["shares"].items()}
        assert effective["blocks"] > effective["oracle"] > effective["maximum"]
        assert [saving["n"] for saving in entry["sharing"]] == [3]
        assert [saving["beam_width"] for saving in entry["beams"]] == [3]
    assert report["cost"]["schedule_ms"] > 0
    for order in report["orders"]:
        (one,) = order["loads"]
        assert (one["load"], order["pool_tokens"] >= 48_000) == (2, True)
        most_overtaken = [one["orders"][name]["most_overtaken"] for name in PATIENCE]
        assert most_overtaken[0] == 0
        assert most_overtaken[1] <= 8
    command = f"memory --parts hits --hit-block-size 64 --hit-blocks 5 25 --trace {mooncake}"
    monkeypatch.setattr(sys, "argv", command.split())
    memory.main()
    out = capsys.readouterr().out
    assert "passed over: the longest prompt takes 21 blocks" in out
    hits = json.loads(out.splitlines()[-1])["hits"]
    assert [entry["num_blocks"] for entry in hits] == [25, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--plot {folder}/nowhere/a.png", "expected a file in a folder that exists"),
        ("--plot {folder}", "expected a file in a folder that exists"),
        ("--plot a.png --parts cost", "--plot draws the part waste, got --parts cost"),
        ("--parts hits", "a file that ends in .jsonl; got no --trace"),
        ("--parts hits --trace {folder}/good.csv", "a file that ends in .jsonl; got"),
        ("--load 0", "expected a finite number above 0, got '0'"),
        ("--load -1", "expected a finite number above 0, got '-1'"),
        ("--load 1 nan", "expected a finite number above 0, got 'nan'"),
        ("--load inf", "expected a finite number above 0, got 'inf'"),
        ("--block-size 24", "invalid choice: 24"),
        ("--block-size 256", "invalid choice: 256"),
        ("--beam-widths 2 33", "beam_width must be at most 32, got 33"),
        ("--parts waste --trace {folder}/empty.csv", "needs a request with a prompt and an answer"),
        ("--parts order --trace {folder}/empty.jsonl", "needs a prompt with tokens; got none in 0"),
        ("--parts order --trace {folder}/short.jsonl", "short.jsonl, line 2: expected a JSON"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path, options, message
):
    whole = {"timestamp": 0, "input_length": 7, "output_length": 9, "hash_ids": [0]}
    lines = [whole, {key: whole[key] for key in whole if key != "hash_ids"}]
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "good.csv").write_text("input_tokens,output_tokens\n7,9\n")
    (tmp_path / "empty.csv").write_text("input_tokens,output_tokens\n7,0\n")
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["memory", *options.format(folder=tmp_path).split()])
    with pytest.raises(SystemExit):
        memory.main()
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_trace_of_lengths_alone_serves_the_parts_that_need_no_more(tmp_path):
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"input_length": 5, "output_length": 3}\n')
    assert read_trace(path) == [RequestLengths(input_tokens=5, output_tokens=3)]
    with pytest.raises(ValueError, match=r"lengths.jsonl, line 1: .* hash_ids"):
        read_prompts(path, 1)


def test_figures_are_printed_though_the_picture_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
):
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(memory, "has_matplotlib", lambda: True)
    monkeypatch.setattr(memory, "draw", fail)
    command = f"memory --parts waste --requests 150 --slabs 5 --plot {tmp_path}/memory.png"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(OSError, match="the disk is full"):
        memory.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "memory"


def test_beams_over_a_prompt_alone_save_all_of_it_but_once():
    lengths = [RequestLengths(input_tokens=160, output_tokens=1)] * 5
    saving = save_beams(lengths, 4, num_slots=3_200, block_size=16, seed=0)
    assert saving.measured == 1 - 1 / 4
    assert saving.preemptions == saving.copied_blocks == 0


def test_beams_save_more_than_siblings_and_less_than_all_but_one():
    lengths = law_lengths("sharegpt", 30, seed=0)
    beams = save_beams(lengths, 3, num_slots=12_000, block_size=16, seed=0)
    siblings = save(lengths, 3, num_slots=12_000, block_size=16)
    assert siblings.measured < beams.measured < 1 - 1 / 3
    assert 1 / 3 < beams.survivors < 1


def test_the_questions_for_a_model_are_forty_and_differ():
    assert len(set(QUESTIONS)) == 40


def test_twelve_thousand_random_operations_keep_every_promise():
    counts = blast(12_000, seed=1)
    for name in ("forks", "searches", "beams that waited", "preemptions", "failed steps"):
        assert counts[name] > 50, f"{name}: {counts[name]}"
    for name in ("aborted in a step", "resets", "swapped out", "swapped in"):
        assert counts[name] > 50, f"{name}: {counts[name]}"
    assert counts["copied blocks"] > 500
    assert counts["hit tokens"] > 5_000


def test_a_broken_promise_names_the_seed_that_shows_it_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "own_tail", lambda *_: [])  # nothing is copied
    monkeypatch.setattr(blast_module, "LIFE", 500)
    with pytest.raises(BlastError) as first:
        blast(3_000, seed=7)
    words = str(first.value).split()
    seed, length = int(words[words.index("--seed") + 1]), int(words[-1])
    with pytest.raises(BlastError) as again:
        blast(length, seed=seed)
    assert str(again.value) == str(first.value)
