"""`jpaged chat`: what is remembered, what an interrupt stops, and what no longer fits."""

import io
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from jpaged import LLM, SamplingParams, chat
from jpaged.chat import Chat
from jpaged.cli import main
from jpaged.config import EngineConfig
from tests.helpers import LLM_OPTIONS

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: pathlib.Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, **LLM_OPTIONS, use_tqdm=False) as llm:
        yield llm


def roles(talk: Chat) -> list[str]:
    return [message["role"] for message in talk.history]


def test_answers_come_in_pieces_and_are_remembered(llm: LLM):
    talk, pieces = Chat(llm, PARAMS, system="Be brief."), []
    talk.answer("the sea", pieces.append)
    assert len(pieces) > 1
    assert talk.history[1] == {"role": "assistant", "content": "".join(pieces)}
    talk.answer("the sun", pieces.append)
    assert roles(talk) == ["user", "assistant", "user", "assistant"]
    # The second prompt is the first one, its answer and the new question: a prefix that is known.
    assert llm.stats().hit_rate > 0
    talk.reset()
    assert talk.history == []


def test_an_interrupt_stops_the_answer_alone_and_keeps_what_was_written(llm: LLM):
    talk, pieces = Chat(llm, PARAMS), []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    talk.answer("the sea", write)
    assert talk.history[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert len(pieces) == 2
    assert not llm.has_unfinished_requests
    assert llm.stats().blocks_used == 0
    talk.answer("the sun", pieces.append)
    assert roles(talk) == ["user", "assistant", "user", "assistant"]


def test_the_oldest_is_forgotten_when_the_context_is_full(llm: LLM):
    talk = Chat(llm, PARAMS, system="Be brief.")
    for number in range(8):
        talk.answer(f"question {number} of the sea and the sun", lambda _: None)
    assert talk.history[-2]["content"].startswith("question 7")
    assert 2 <= len(talk.history) < 16
    assert talk.history[0]["role"] == "user"


def test_the_oldest_is_forgotten_when_the_pool_is_smaller_than_the_context(
    tiny_model_dir: pathlib.Path,
):
    options: dict[str, Any] = LLM_OPTIONS | {"num_blocks": 16}
    with LLM(tiny_model_dir, **options, use_tqdm=False) as llm:
        talk = Chat(llm, PARAMS)
        for number in range(6):
            talk.answer(f"question {number} of the sea", lambda _: None)
        assert 2 <= len(talk.history) < 12


def test_a_question_that_does_not_fit_is_refused_and_forgotten(llm: LLM):
    talk = Chat(llm, PARAMS)
    talk.answer("the sea", lambda _: None)
    with pytest.raises(ValueError, match="max_model_len"):
        talk.answer("the sea and the sun " * 90, lambda _: None)
    talk.answer("the sun", lambda _: None)
    assert talk.history[-2]["content"] == "the sun"
    assert not any("sea and" in message["content"] for message in talk.history)
    assert talk.history[0]["content"] == "the sea", "what came before the refused one is kept"


def test_the_loop_reads_until_the_end_and_knows_its_commands(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = iter(["the sea", "", "/reset", "/help", "the sun " * 200, "/etc is a folder"])

    def read(prompt: str) -> str:
        assert prompt == "", "what is piped to a file is answers alone"
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    talk = Chat(llm, PARAMS)
    chat.run(talk)
    assert roles(talk) == ["user", "assistant"]
    assert talk.history[0]["content"] == "/etc is a folder"
    shown = capsys.readouterr()
    assert talk.history[1]["content"] in shown.out
    assert shown.err.count("Ctrl-C stops an answer") == 2
    assert "max_model_len" in shown.err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_interrupt_at_the_prompt_asks_again_where_somebody_types(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
):
    errors = iter([KeyboardInterrupt, KeyboardInterrupt, EOFError])

    def read(_: str) -> str:
        raise next(errors)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
    if is_terminal:
        chat.run(Chat(llm, PARAMS))
        assert next(errors, None) is None
    else:
        with pytest.raises(KeyboardInterrupt):
            chat.run(Chat(llm, PARAMS))


def test_the_pool_holds_one_conversation_unless_told_otherwise(
    tiny_model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[EngineConfig] = []
    monkeypatch.setattr(chat, "run", lambda talk: seen.append(talk._limits))
    assert main(["chat", str(tiny_model_dir), "--max-model-len", "100"]) == 0
    assert main(["chat", str(tiny_model_dir), "--num-blocks", "30"]) == 0
    assert [limits.max_num_seqs for limits in seen] == [1, 1]
    assert [limits.num_blocks for limits in seen] == [1 + 7, 30]  # of 16 tokens, and the null block


def test_a_model_without_a_template_knows_no_conversation(
    tiny_model_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("jpaged.llm.build_engine", None)  # it is refused before that is called
    folder = shutil.copytree(tiny_model_dir, tmp_path / "silent")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["chat", str(folder), "--num-blocks", "20"]) == 2
    told = "has no chat template, so it knows no conversation; leave MODEL out for HuggingFaceTB/"
    assert told in capsys.readouterr().err


def test_options_of_many_answers_are_unknown_to_it(capsys: pytest.CaptureFixture[str]):
    answers = ("--n=2", "--best-of=3", "--logprobs=1", "--json")
    for flag in (*answers, "--max-num-seqs=2", "--max-waiting=2", "--swap-space=1"):
        with pytest.raises(SystemExit):
            main(["chat", flag])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
