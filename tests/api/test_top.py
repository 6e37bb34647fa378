"""`jpaged top`: what is generated, until when, and what each drawing says of the pool."""

import dataclasses
import io
import itertools
import pathlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from rich.console import Console

from jpaged import LLM, SamplingParams, marks, top, top_load
from jpaged.cli import main
from jpaged.runner import Runner
from tests.helpers import LLM_OPTIONS

OPTIONS = ["--num-blocks", "20", "--max-num-seqs", "3", "--max-model-len", "64"]


@pytest.fixture
def llm(tiny_model_dir: pathlib.Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, **LLM_OPTIONS, use_tqdm=False) as llm:
        yield llm


def console(width: int = 200, height: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True)


def said(to: Console) -> str:
    return to.file.getvalue()  # type: ignore[attr-defined]


def drawn(
    llm: LLM, width: int = 200, height: int = 40, titles: Mapping[str, str] | None = None
) -> list[str]:
    """The lines of a drawing after two seconds."""
    of = Console(file=io.StringIO(), width=width, height=height)
    of.print(top.draw(llm, 2.0, of, titles or {}))
    return said(of).splitlines()


def start(llm: LLM, num_sequences: int) -> None:
    """Submits two prompts with so many answers in all, and runs a few steps."""
    prompts = ("the sea and the sun " * 3, "the sun")
    for prompt, n in zip(prompts, (num_sequences - 2, 2), strict=True):
        params = SamplingParams(max_tokens=20, ignore_eos=True, n=n, seed=1)
        llm.submit(prompt, params, request_id=prompt[:8].strip())
    for _ in range(6):
        llm.step()


def question(text: str) -> top_load.Question:
    return top_load.Question(text, text)


def test_a_drawing_has_the_figures_the_blocks_and_the_texts(llm: LLM):
    start(llm, 4)
    lines, stats = drawn(llm), llm.stats()
    assert lines[0].startswith(f"40 blocks of 8 tokens: {stats.blocks_used} in use")
    assert f"{stats.generated_tokens} tokens in 2.0 s" in lines[0]
    assert lines[0].rstrip().endswith("0 preemptions")
    pool = lines[2]
    assert sum(pool.count(sign) for sign in marks.LEVELS[1:]) == stats.blocks_used
    assert pool.count("x") == 1
    assert lines[3] == "▁▄█ in use, underlined: shared; ~ kept; · empty; x padding"
    assert lines[5].split() == ["tokens", "blocks", *["its", "text", "so", "far"]]
    assert sum(line.split(maxsplit=3)[3].startswith("the sun") for line in lines[6:]) == 2
    assert any("a question" in line for line in drawn(llm, titles={"the sun": "a question"}))


def test_one_preemption_is_in_the_singular(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    stats = dataclasses.replace(llm.stats(), preemptions=1)
    monkeypatch.setattr(llm, "stats", lambda: stats)
    assert drawn(llm)[0].rstrip().endswith("1 preemption")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_text_gives_way_where_the_terminal_is_narrow(llm: LLM, width: int):
    start(llm, 4)
    lines = drawn(llm, width)
    heading = next(i for i, line in enumerate(lines) if "tokens  blocks  its text" in line)
    for line, table in zip(lines[heading + 1 :], llm.snapshot().tables, strict=True):
        figures = (table.num_computed_tokens, len(table.block_ids))
        letter, *found = line.split()[:3]
        assert (letter, *map(int, found)) == (marks.letter(table.row), *figures)
        assert len(line) <= width - top.ECHO_WIDTH


def test_as_many_sequences_are_listed_as_there_are_lines_for(llm: LLM):
    start(llm, 8)
    lines = drawn(llm, 80, 13)
    assert len(lines) == 12, "the cursor has a line of its own"
    assert lines[-1].split() == ["…", "and", "4", "more", "sequences"]


def test_all_is_generated_few_at_a_time(llm: LLM):
    most = 0
    submit = llm.submit

    def watch(*args: object, **more: object) -> str:
        nonlocal most
        request_id = submit(*args, **more)  # type: ignore[arg-type]
        most = max(most, len(llm.engine.scheduler.requests))
        return request_id

    llm.submit = watch  # type: ignore[method-assign]
    params = [SamplingParams(max_tokens=1 + i % 5, ignore_eos=True, seed=i) for i in range(12)]
    of = console()
    top.run(llm, ((question("the sea"), one) for one in params), at_once=4, console=of)
    assert most == 4
    assert llm.stats().generated_tokens == sum(1 + i % 5 for i in range(12))
    assert "0 in use (0 shared)" in said(of)


@pytest.fixture
def _heard() -> Iterator[None]:
    """Ctrl-C is heard, as at a terminal; tests that run in the background begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, *, step: int, times: int) -> None:
    step_of, steps = LLM.step, itertools.count(1)

    def interrupted(llm: LLM) -> object:
        outputs = step_of(llm)
        if next(steps) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return outputs

    monkeypatch.setattr(LLM, "step", interrupted)


def endless(max_tokens: int = 9) -> top_load.Load:
    return top_load.load_of(
        [question("the sea")], max_tokens=max_tokens, rounds=None, max_answers=1
    )


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_ends_it_and_the_last_drawing_stays(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    interrupt_in_step(monkeypatch, step=7, times=1)
    of, before = console(), signal.getsignal(signal.SIGINT)
    top.run(llm, endless(), at_once=4, console=of)
    assert llm.stats().running > 0
    last = said(of)[said(of).rindex("blocks of 8 tokens") :]
    assert f"{llm.stats().blocks_used} in use" in last
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("_heard")
def test_a_second_ctrl_c_interrupts_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    interrupt_in_step(monkeypatch, step=3, times=2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        top.run(llm, endless(), at_once=4, console=console())
    assert signal.getsignal(signal.SIGINT) is before


def test_the_load_goes_on_with_answers_of_all_lengths_and_numbers():
    found = list(itertools.islice(endless(14), 7))
    assert [params.max_tokens for _, params in found] == [2, 4, 6, 8, 10, 12, 14]
    each = [question("a"), question("b"), question("c")]
    bounded = list(top_load.load_of(each, max_tokens=1, rounds=3, max_answers=2))
    assert [one.title for one, _ in bounded] == ["a", "b", "c"] * 3
    assert {params.max_tokens for _, params in bounded} == {1}
    assert [params.n for _, params in bounded] == [1, 2, 1, 2, 1, 2, 1, 2, 1]


def test_the_demo_s_prompts_follow_the_model_s_template_and_begin_alike(llm: LLM):
    first, second = top_load.demo_questions(llm, ["Why?", "How?"])
    assert (first.title, second.title) == ("Why? ", "How? ")
    assert llm.tokenizer is not None
    for one in (first, second):
        text = f"{top_load.OPENING}\n\n{one.title.strip()}\n"
        message = {"role": "user", "content": text}
        assert one.prompt == llm.tokenizer.apply_chat_template([message])


def test_the_demo_shares_its_opening():
    limits: dict[str, Any] = {"num_blocks": 100, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with LLM("tiny", **limits, warm_up=False, use_tqdm=False) as llm:
        questions = top_load.demo_questions(llm, ["Why is the sea blue?", "Who was Caesar?"])
        most_shared = 0
        step = llm.step

        def watch() -> object:
            nonlocal most_shared
            most_shared = max(most_shared, llm.snapshot().num_shared)
            return step()

        llm.step = watch  # type: ignore[method-assign]
        load = top_load.load_of(questions, max_tokens=7, rounds=3, max_answers=3)
        top.run(llm, load, at_once=4, console=console())
        assert most_shared >= 5
        assert llm.stats().hit_rate > 0.5


def test_the_command_goes_on_until_ctrl_c_which_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    interrupt_in_step(monkeypatch, step=60, times=1)
    limits = ["--num-blocks", "60", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"]
    assert main(["top", "--model", "tiny", *limits, "--max-tokens", "2", "--max-waiting", "2"]) == 0
    assert "prefix hits 0 %" not in capsys.readouterr().out


def test_the_command_takes_a_file_of_prompts_and_runs_it_once(
    tiny_model_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts.txt").write_text("the sea\nthe sun\n")
    command = ["top", "--model", str(tiny_model_dir), *OPTIONS, "--max-tokens", "7"]
    command += ["--prompts-file", str(tmp_path / "prompts.txt")]
    for rounds, num_tokens in (([], 1 + 2), (["--rounds", "2"], 1 + 2 + 3 + 4)):
        assert main([*command, *rounds]) == 0
        assert f"{num_tokens} tokens in" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_before_anything_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Runner, "warm_up", None)  # calling it would be another error
    assert main(["top", "--model", "tiny", "--num-blocks", "3"]) == 2
    assert "'What is the capital of France?': " in capsys.readouterr().err
    assert main(["top", "--model", "tiny", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "jpaged: --rounds must be at least 1, got 0\n"
