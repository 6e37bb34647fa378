"""The command line, run in this process on a tiny model."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from jpaged import LLM, SamplingParams, cli
from jpaged.cli_options import parse
from tests.helpers import LLM_OPTIONS

SMALL = ["--num-blocks", "31", "--max-num-seqs", "3", "--max-num-batched-tokens", "20", "--quiet"]


def test_one_prompt_prints_its_text_alone(tiny_model_dir, capsys):
    assert generate(tiny_model_dir, "the fox", "--temperature", "0", "--max-tokens", "5") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 1
    assert err == ""


def test_streamed_text_equals_text_at_once(tiny_model_dir, capsys):
    options = ["--seed", "5", "--max-tokens", "19", "--ignore-eos", "--chat", "--system", "be kind"]
    generate(tiny_model_dir, "hello", *options)
    at_once = capsys.readouterr().out
    generate(tiny_model_dir, "hello", *options, "--stream")
    assert capsys.readouterr().out == at_once


def test_json_has_one_line_a_prompt_in_order(tiny_model_dir, capsys, tmp_path):
    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text("from the file\n\n  \nand another, älter\n", encoding="utf-8")
    options = ["--n", "2", "--max-tokens", "3", "--ignore-eos", "--json", "--stats"]
    generate(tiny_model_dir, "given", "--prompts-file", str(prompts_file), *options)
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == ["given", "from the file", "and another, älter"]
    assert [len(c["token_ids"]) for a in answers for c in a["outputs"]] == [3] * 6
    assert err.startswith("requests: 3; tokens: 18 in ")


def test_sampling_flags_mean_what_the_api_means_by_them(tiny_model_dir, capsys):
    fields: dict[str, Any] = {
        "seed": 3,
        "max_tokens": 12,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "n": 1,
        "best_of": 2,
        "logprobs": 2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    assert generate(tiny_model_dir, "the dog", *flags, "--no-prefix-caching", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    with LLM(tiny_model_dir, **LLM_OPTIONS) as llm:
        (expected,) = llm.generate("the dog", SamplingParams(**fields))
    assert [found["token_ids"] for found in answer["outputs"]] == [
        found.token_ids for found in expected.outputs
    ]
    assert len(answer["outputs"][0]["logprobs"][0]) >= 2


def test_a_file_of_prompts_that_is_not_utf_8_is_named(tiny_model_dir, capsys, tmp_path):
    (tmp_path / "latin.txt").write_bytes("älter".encode("latin-1"))
    assert generate(tiny_model_dir, "--prompts-file", str(tmp_path / "latin.txt")) == 2
    assert "latin.txt is not text in UTF-8 (byte 0" in capsys.readouterr().err


def test_prompts_come_from_stdin_after_a_dash(tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert generate(tiny_model_dir, "--prompts-file", "-", "--max-tokens", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> one", "> two"]


def test_stop_strings_end_the_text_before_them(tiny_model_dir, capsys):
    options = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    generate(tiny_model_dir, "a block", *options)
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[3:5]
    generate(tiny_model_dir, "a block", *options, "--stop", "no such text", "--stop", stop)
    assert capsys.readouterr().out.removesuffix("\n") == whole[: whole.index(stop)]


def test_loading_says_nothing_on_stdout(tiny_model_dir, capsys):
    limits = ["--max-num-seqs", "3", "--max-num-batched-tokens", "20"]
    options = ["--model", str(tiny_model_dir), "--max-tokens", "2", "--json", *limits]
    assert cli.main(["generate", "the dog", *options]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "blocks" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["the dog", "--top-p", "1.5"], "top_p must be"),
        (["the dog", ""], "a prompt is empty"),
        ([], "there is no prompt"),
        (["--prompts-file", "no-such-file.txt"], "no-such-file.txt"),
        (["a", "b", "--stream"], "--stream shows one answer, got 2 prompts"),
        (["a", "--system", "be kind"], "needs --chat"),
        (["a", "--logprobs", "2"], "--logprobs are shown by --json alone"),
        (["a", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["a", "--max-waiting", "0"], "max_waiting must be"),
        (["a", "--max-tokens", "150", "--num-blocks", "5"], "the pool has 4"),
        (["a", "--block-size", "12"], "block_size must be a power of two"),
    ],
)
def test_a_caller_s_mistake_is_one_line_and_status_two(tiny_model_dir, capsys, arguments, words):
    assert generate(tiny_model_dir, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jpaged: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_model_that_is_not_there_is_one_line_too(capsys, tmp_path):
    assert generate(tmp_path, "a") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_option_is_refused_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "a", "--max-token", "3"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage: jpaged generate [PROMPT ...]" in err
    assert "unrecognized arguments: --max-token" in err


def test_demo_prints_every_answer_and_the_figures(tiny_model_dir, capsys):
    assert cli.main(["demo", "--model", str(tiny_model_dir), "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    *_, figures, model = out.splitlines()
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == [
        question for question, _ in cli.DEMO_QUESTIONS
    ]
    assert figures.startswith(f"requests: {len(cli.DEMO_QUESTIONS)}; tokens: ")
    assert all(word in figures for word in ("tokens/s", "peak blocks", "waste", "compiles"))
    assert model == f"model: {tiny_model_dir}"
    assert "generating" in err


def test_warmup_compiles_every_common_program(tiny_model_dir, capsys):
    assert cli.main(["warmup", str(tiny_model_dir), *SMALL[:-1]]) == 0
    out, _ = capsys.readouterr()
    options: dict[str, Any] = LLM_OPTIONS | {"max_num_seqs": 3}
    with LLM(tiny_model_dir, **options) as llm:
        llm.engine.runner.warm_up()
        num_programs = llm.stats().compiles
    assert re.match(rf"{tiny_model_dir}: {num_programs} programs in \d+\.\d s, .*; kept ", out)


def test_help_loads_no_jax():
    code = (
        "import sys; from jpaged import cli\n"
        "try: cli.main(['generate', '--help'])\n"
        "except SystemExit: print('jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.endswith("False\n")
    assert "examples:" in run.stdout


def generate(directory: pathlib.Path, *arguments: str) -> int:
    return cli.main(["generate", "--model", str(directory), *SMALL, *arguments])


def test_convert_takes_the_default_model_where_none_is_named():
    found = parse(["convert", "dest"])
    assert (found.source, found.directory) == (None, "dest")
    found = parse(["convert", "there", "dest", "--dtype", "float32"])
    assert (found.source, found.directory) == ("there", "dest")


def test_convert_writes_a_model_that_every_command_takes(tiny_model_dir, tmp_path, capsys):
    dest = tmp_path / "dest"
    assert cli.main(["convert", str(tiny_model_dir), str(dest), "--dtype", "bfloat16"]) == 0
    assert re.search(r"[\d,]+ parameters in bfloat16, written to ", capsys.readouterr().out)
    assert generate(dest, "the fox", "--max-tokens", "3") == 0
    assert cli.main(["convert", str(tiny_model_dir), str(dest)]) == 2
    assert "is not empty; name a directory that is not there yet" in capsys.readouterr().err
