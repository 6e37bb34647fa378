"""Bad input is refused with words, before any device work, and the engine goes on."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import tokenizers

import jpaged
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged_models import ChatTemplate, Tokenizer
from tests.helpers import LLM_OPTIONS, llm_over, make_prompt, tiny_engine
from tests.models.tiny_files import (
    LLAMA_VALUES,
    as_gguf_tensors,
    llama_tensors,
    write_directory,
    write_gguf,
    write_json,
)

GOOD = make_prompt(5)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llm_over(tiny_engine(num_blocks=9), letters_tokenizer())


def letters_tokenizer() -> Tokenizer:
    """Its text is letters, a token each; its template writes out what a user says."""
    letters = {letter: index for index, letter in enumerate("abcdefghij")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = (
        "{% for message in messages %}{% if message.role != 'user' %}"
        "{{ raise_exception(message.role) }}{% endif %}{{ message.content }}{% endfor %}"
    )
    return Tokenizer(
        backend=backend,
        bos_token_id=None,
        eos_token_ids=(2,),
        chat_template=ChatTemplate(sources={"default": template}),
    )


@pytest.fixture(autouse=True)
def no_step_ran(request: pytest.FixtureRequest):
    """No refusal reaches the device, and good prompts are answered afterwards."""
    if "llm" not in request.fixturenames:
        yield
        return
    llm: LLM = request.getfixturevalue("llm")
    before = llm.stats()
    yield
    assert llm.stats() == before
    (output,) = llm.generate(GOOD, GREEDY, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"


NO_PROMPTS = [
    ("", ValueError, "empty"),
    ([], ValueError, "empty"),
    ([[]], ValueError, "empty"),
    ([[3, 4], []], ValueError, "empty"),
    (["", "a"], ValueError, "empty"),
    ([3, 4.0], TypeError, "integers"),
    (np.array([3.0, 4.0]), TypeError, "integers"),
    (np.array([True, False]), TypeError, "got bool"),
    (np.array(3), TypeError, "got ndarray"),
    (np.zeros((2, 0), np.int32), ValueError, "empty"),
    ([3, math.nan], TypeError, "integers"),
    ([3, None], TypeError, "integers"),
    ([[3, [4]]], TypeError, "integers"),
    ([None], TypeError, "got NoneType"),
    ([["a", "b"]], TypeError, "integers; got 'a' of type str in the list"),
    ("a \ud800", ValueError, r"lone surrogate '\\ud800' at 2"),
    (["a", "\udcff"], ValueError, "lone surrogate"),
    ([3, True], TypeError, "integers"),
    ([3, "a"], TypeError, "integers"),
    (7, TypeError, "got int"),
    (None, TypeError, "got NoneType"),
    (b"bytes", TypeError, "got bytes"),
    (bytearray(b"bytes"), TypeError, "got bytearray"),
    ({3, 4}, TypeError, "got set"),
    ((token for token in (3, 4)), TypeError, "got generator"),
    ({"prompt": "a"}, TypeError, "got dict"),
    ([{"prompt": "a"}], TypeError, "got dict"),
]
NOT_THIS_MODELS = [
    ("   ", ValueError, "no tokens"),
    (make_prompt(96), ValueError, "96 tokens and max_model_len is 96"),
    (make_prompt(300), ValueError, "300 tokens and max_model_len is 96"),
    (make_prompt(70), ValueError, "may need 10 blocks of 8 tokens and the pool has 8"),
    ([3, 53], ValueError, "53 is outside the vocabulary of 53"),
    ([3, -1], ValueError, "-1 is outside"),
    (np.array([3, 99]), ValueError, "99 is outside"),
    ([3, 2**70], ValueError, "outside the vocabulary of 53"),
]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [*NO_PROMPTS, *NOT_THIS_MODELS],
    ids=lambda value: ascii(value)[:20],
)
def test_a_bad_prompt_is_refused(llm: LLM, prompt: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "error", "message"), NO_PROMPTS, ids=lambda value: ascii(value)[:20]
)
def test_what_no_model_takes_is_refused_before_one_is_loaded(
    prompt: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        jpaged.generate(prompt, model="no/such-model")


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [[3, 99], make_prompt(96), make_prompt(70)], ids=len)
def test_one_bad_prompt_among_good_ones_refuses_the_whole_call(
    llm: LLM, place: int, bad: list[int]
):
    prompts = [GOOD, make_prompt(9)]
    prompts.insert(place, bad)
    with pytest.raises(ValueError, match=r"vocabulary|max_model_len|never fit"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("name", ["submit", "stream"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((make_prompt(70), GREEDY), ValueError, "never fit"),
        (("",), ValueError, "empty"),
        ((["a", "b"],), TypeError, "a prompt is text or a list of token ids"),
        ((None,), TypeError, "got NoneType"),
        ((GOOD, 3), TypeError, "expected SamplingParams or None, got int"),
        ((GOOD, [GREEDY]), TypeError, "expected SamplingParams or None, got list"),
        ((GOOD, {"n": 2}), TypeError, "expected SamplingParams or None, got dict"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_submit_and_stream_refuse_at_once(
    llm: LLM, name: str, arguments: tuple[Any, ...], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        getattr(llm, name)(*arguments)


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(GOOD),
        [np.int64(token) for token in GOOD],
        *(np.array(GOOD, dtype) for dtype in (np.int32, np.uint8, np.int64, np.uint64)),
    ],
    ids=lambda prompt: str(getattr(prompt, "dtype", type(prompt[0]))),
)
def test_token_ids_of_numpy_are_token_ids(prompt: Any):
    llm = llm_over(tiny_engine())
    wanted = llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs
    for prompts in (prompt, [prompt], np.array([prompt, prompt])):
        for output in llm.generate(prompts, GREEDY, use_tqdm=False):
            assert output.outputs == wanted
            assert output.prompt_token_ids == GOOD
            assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (None, TypeError, "got NoneType"),
        ({"role": "user", "content": "a"}, TypeError, "got dict"),
        ("a", TypeError, "got str"),
        ([], ValueError, "no messages"),
        ([[]], ValueError, "a conversation is empty"),
        ([{"role": "user"}], ValueError, "without"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "'image_url'"),
        ([{"role": "user", "content": ""}], ValueError, "empty"),
        ([{"role": "user", "content": " "}], ValueError, "no tokens"),
        ([{"role": "user", "content": "a " * 96}], ValueError, "96 tokens and max_model_len is 96"),
        ([{"role": "robot", "content": "a"}], ValueError, "template refused the messages: robot"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_messages_are_refused(llm: LLM, messages: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        llm.chat(messages, GREEDY)


def test_parts_of_text_are_answered_as_the_whole():
    llm = llm_over(tiny_engine(), letters_tokenizer())
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)
    assert output.prompt == "a b\nc"
    assert output.prompt_token_ids == [0, 1, 2]


@pytest.mark.parametrize("method", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampling_params": 3}, TypeError, "a list of them or None, got int"),
        ({"sampling_params": "greedy"}, TypeError, "a list of them or None, got str"),
        ({"sampling_params": {"n": 1}}, TypeError, "a list of them or None, got dict"),
        ({"sampling_params": [None]}, TypeError, "expected SamplingParams .*, got NoneType"),
        ({"sampling_params": []}, ValueError, "1 prompts and 0 SamplingParams"),
        ({"use_tqdm": "no"}, TypeError, "use_tqdm must be True or False, got 'no'"),
        ({"use_tqdm": None}, TypeError, "use_tqdm must be True or False, got None"),
        ({"max_tokens": 3}, TypeError, "max_tokens"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_call_are_refused(
    llm: LLM, method: str, options: dict[str, Any], error: type[Exception], message: str
):
    prompts: Any = GOOD if method == "generate" else [{"role": "user", "content": "a"}]
    with pytest.raises(error, match=message):
        getattr(llm, method)(prompts, **options)


def test_whether_a_prompt_for_the_answer_is_added_is_a_flag(llm: LLM):
    with pytest.raises(TypeError, match="add_generation_prompt must be True or False, got 0"):
        llm.chat([{"role": "user", "content": "a"}], add_generation_prompt=0)  # pyright: ignore[reportArgumentType]


def test_a_request_that_only_the_pool_refuses_names_both_numbers(llm: LLM):
    with pytest.raises(ValueError, match=r"5 prompt tokens and max_tokens=61 .* 9 blocks .* has 8"):
        llm.generate(GOOD, dataclasses.replace(GREEDY, max_tokens=61))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": -3}, ValueError, "n must be"),
        ({"n": 1.0}, TypeError, "n must be an int"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
        ({"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": -0.1}, ValueError, "top_p must be"),
        ({"top_p": math.nan}, ValueError, "top_p must be finite"),
        ({"temperature": -0.5}, ValueError, "temperature must be"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": -2}, ValueError, "top_k must be"),
        ({"min_p": 1.5}, ValueError, "min_p must be"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be"),
        ({"logprobs": 21}, ValueError, "logprobs must be"),
        ({"presence_penalty": 2.5}, ValueError, "presence_penalty must be from -2.0 to 2.0"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be from 0.01 to 100"),
        ({"logit_bias": {3: 200}}, ValueError, "logit_bias of token 3 must be from -100.0 to 100"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids must not be empty"),
        ({"bad_words": [3]}, TypeError, "each of bad_words must be a list of ints, got 3"),
        ({"seed": "lucky"}, TypeError, "seed must be"),
        ({"stop": [""]}, ValueError, "empty"),
        ({"stop": 3}, TypeError, "stop must be"),
        ({"max_token": 5}, TypeError, "max_token"),
    ],
    ids=str,
)
def test_bad_sampling_parameters_are_refused_by_either_door(
    options: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        SamplingParams(**options)
    with pytest.raises(error, match=message):  # before any model is loaded
        jpaged.generate("a", model="no/such-model", **options)


def test_sampling_parameters_of_another_kind_or_number_are_refused(llm: LLM):
    with pytest.raises(TypeError, match="expected SamplingParams for each prompt, got dict"):
        llm.generate([GOOD, GOOD], [GREEDY, {"n": 1}])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="2 prompts and 1 SamplingParams"):
        llm.generate([GOOD, GOOD], [GREEDY])


@pytest.mark.parametrize(
    ("priority", "error", "message"),
    [
        (1.0, TypeError, "priority must be an int, got 1.0 of type float"),
        ("high", TypeError, "priority must be an int, got 'high'"),
        ([0, True], TypeError, "priority must be an int, got True"),
        ([0, None], TypeError, "priority must be an int, got None"),
        ([0], ValueError, "2 prompts and 1 priorities"),
        (2**63, ValueError, "priority must be at most"),
    ],
    ids=str,
)
def test_priorities_that_are_no_ints_or_not_one_for_each_are_refused(
    llm: LLM, priority: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        llm.generate([GOOD, GOOD], GREEDY, priority=priority)


@pytest.mark.parametrize("name", ["submit", "stream"])
@pytest.mark.parametrize("priority", [None, [1], "1", 0.5], ids=str)
def test_submit_and_stream_take_one_int_as_priority(llm: LLM, name: str, priority: Any):
    with pytest.raises(TypeError, match="priority must be an int"):
        getattr(llm, name)(GOOD, GREEDY, priority=priority)


def test_min_tokens_with_more_stop_ids_than_a_row_holds_is_refused(llm: LLM):
    params = SamplingParams(min_tokens=2, stop_token_ids=list(range(17)))
    with pytest.raises(ValueError, match="at most 16 stop ids"):
        llm.generate(GOOD, params)


def test_stop_ids_outside_the_vocabulary_are_refused(llm: LLM):
    with pytest.raises(ValueError, match="99 is outside the vocabulary of 53"):
        llm.generate(GOOD, SamplingParams(stop_token_ids=[99]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {53: 1.0}}, "logit_bias of token id 53 is outside the vocabulary of 53"),
        ({"allowed_token_ids": [4, 53]}, "allowed token id 53 is outside"),
        ({"bad_words": [[4, 99]]}, "bad word's token id 99 is outside"),
        ({"bad_words": [[3, token] for token in range(33)]}, "at most 32 tokens"),
        ({"bad_words": ["b", [2, 3]], "allowed_token_ids": [1, 3]}, "every one of allowed"),
        ({"bad_words": [[token] for token in range(53)]}, "may forbid every one"),
        (
            {"min_tokens": 1, "stop_token_ids": [4], "allowed_token_ids": [4]},
            "every one of allowed",
        ),
    ],
    ids=str,
)
def test_what_bends_logits_must_fit_the_vocabulary_and_leave_a_token(
    llm: LLM, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        llm.generate(GOOD, dataclasses.replace(GREEDY, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 97}, ValueError, "max_model_len=97 exceeds the model's context of 96"),
        ({"attention_backend": "flash"}, ValueError, "attention_backend must be one of"),
        ({"attention_backend": "pallas-tpu"}, ValueError, "needs a tpu"),
        ({"attention_backend": "pallas-gpu"}, ValueError, "needs a gpu"),
        ({"revision": "main"}, ValueError, "revision is for hub ids"),
        ({"max_num_seq": 4}, TypeError, "max_num_seq"),
    ],
    ids=str,
)
def test_engine_options_that_do_not_fit_model_or_device_are_refused(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
):
    directory = write_directory(tmp_path / "tiny", llama_tensors())
    monkeypatch.setattr("jpaged.loading.load_decoder", None)  # the weights are not to be loaded
    with pytest.raises(error, match=message):
        LLM(directory, **options)


def test_a_directory_without_weights_is_refused(tmp_path: pathlib.Path):
    directory = write_directory(tmp_path / "empty", llama_tensors())
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        LLM(directory)
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        LLM(tmp_path / "nowhere")


def test_a_truncated_or_junk_safetensors_file_is_refused(tmp_path: pathlib.Path):
    directory = write_directory(tmp_path / "torn", llama_tensors())
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:9], b"", b"junk" * 50):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="safetensors"):
            LLM(directory)


def test_a_truncated_or_junk_gguf_file_is_refused(tmp_path: pathlib.Path):
    file = write_gguf(tmp_path / "m.gguf", "llama", LLAMA_VALUES, as_gguf_tensors(llama_tensors()))
    whole = file.read_bytes()
    for content in (whole[:-4000], whole[:90], b"", b"junk" * 50):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="gguf"):
            LLM(file)


def test_a_tokenizer_that_is_not_supported_is_refused_before_the_weights(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jpaged.loading.load_decoder", None)
    values = LLAMA_VALUES | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "command-r",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": ["a b"],
    }
    tensors = as_gguf_tensors(llama_tensors())
    with pytest.raises(ValueError, match="pre-tokenizer 'command-r' is not supported"):
        LLM(write_gguf(tmp_path / "m.gguf", "llama", values, tensors))
    directory = write_directory(tmp_path / "broken", llama_tensors())
    (directory / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        LLM(directory)


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: pathlib.Path):
    with LLM(write_directory(tmp_path / "bare", llama_tensors()), **LLM_OPTIONS) as llm:
        with pytest.raises(ValueError, match=r"has no tokenizer \(.*\); pass token ids"):
            llm.generate("a")
        (output,) = llm.generate([3, 4], GREEDY)
        assert len(output.outputs[0].token_ids) == GREEDY.max_tokens


def test_an_unsupported_architecture_is_refused_and_the_supported_ones_are_named(
    tmp_path: pathlib.Path,
):
    directory = write_directory(tmp_path / "other", llama_tensors())
    write_json(
        directory / "config.json", {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    )
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*LlamaForCausalLM.*GPT2LMHeadModel"):
        LLM(directory)
