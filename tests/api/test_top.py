"""`jpaged top`: all prompts are generated, and each drawing says what the pool holds."""

import io
import pathlib
from collections.abc import Iterator

import pytest
from rich.console import Console

from jpaged import LLM, SamplingParams, marks, top
from jpaged.cli import main
from tests.helpers import LLM_OPTIONS

OPTIONS = ["--num-blocks", "20", "--max-num-seqs", "3", "--max-model-len", "64"]


@pytest.fixture
def llm(tiny_model_dir: pathlib.Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, **LLM_OPTIONS, use_tqdm=False) as llm:
        yield llm


def shown(thing: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_drawing_has_the_figures_the_blocks_and_the_texts(llm: LLM):
    for prompt in ("the sea and the sun " * 3, "the sun"):
        llm.submit(prompt, SamplingParams(max_tokens=20, ignore_eos=True, n=2, seed=1))
    for _ in range(6):
        llm.step()
    text = shown(top.draw(llm, 2.0))
    stats = llm.stats()
    assert f"40 blocks of 8 tokens: {stats.blocks_used} in use" in text
    assert f"{stats.generated_tokens} tokens in 2.0 s" in text
    pool = text.splitlines()[2]
    assert sum(pool.count(sign) for sign in marks.LEVELS[1:]) == stats.blocks_used
    assert pool.count("x") == 1
    assert "its text so far" in text
    while llm.has_unfinished_requests:
        llm.step()


def test_all_prompts_are_generated_few_at_a_time(llm: LLM):
    most = 0
    submit = llm.submit

    def watch(*args: object, **more: object) -> str:
        nonlocal most
        request_id = submit(*args, **more)  # type: ignore[arg-type]
        most = max(most, len(llm.engine.scheduler.requests))
        return request_id

    llm.submit = watch  # type: ignore[method-assign]
    params = [SamplingParams(max_tokens=1 + i % 5, ignore_eos=True, seed=i) for i in range(12)]
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    top.run(llm, ["the sea"] * 12, params, at_once=4, console=console)
    assert most == 4
    assert llm.stats().generated_tokens == sum(1 + i % 5 for i in range(12))
    assert "0 in use (0 shared)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_takes_a_file_of_prompts(
    tiny_model_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts.txt").write_text("the sea\nthe sun\n")
    files = ["--prompts-file", str(tmp_path / "prompts.txt"), "--rounds", "2"]
    assert main(["top", "--model", str(tiny_model_dir), *OPTIONS, *files, "--max-tokens", "4"]) == 0
    assert "5 tokens in" in capsys.readouterr().out
