"""Tokenizers from GGUF metadata and from Hugging Face directories give the ids of the originals."""

import itertools
import json
import pathlib
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from jpaged_models.tokenizer import load_tokenizer
from jpaged_models.weights import TINY, hub, open_checkpoint
from jpaged_models.weights.gguf_tokenizer import tokenizer_from_gguf
from tests.models.tiny_files import write_json

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "smollm2_tokenizer.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def test_default_model_gives_the_golden_ids_and_takes_them_back():
    if hub.packaged_default() is None:
        pytest.skip("the default model's data package is not installed")
    tokenizer = open_checkpoint(None).tokenizer
    assert tokenizer is not None
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(cases) > 40
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49152


def test_default_model_speaks_chatml():
    if hub.packaged_default() is None:
        pytest.skip("the default model's data package is not installed")
    tokenizer = open_checkpoint(None).tokenizer
    assert tokenizer is not None
    assert tokenizer.chat_template is not None
    prompt = tokenizer.chat_template.render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode(prompt)[0] == 1
    assert "<|im_" not in tokenizer.decode(tokenizer.encode(prompt))
    conversation = [{"role": "user", "content": "Hi"}]
    text = tokenizer.chat_template.render(conversation, add_generation_prompt=False)
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_without_a_template_writes_no_conversation():
    tokenizer = open_checkpoint(TINY).tokenizer
    assert tokenizer is not None
    with pytest.raises(ValueError, match="has no chat template; write the prompt out and encode"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_metadata(pre: str, *merges: str, **extra: Any) -> dict[str, Any]:
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 2024", "!", "DON", "'", "T", "\n", " go", " "]),
        ("smollm", ["It", "'s", " ", "2", "0", "2", "4", "!", "DON", "'", "T", "\n", " go", " "]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", "!DON", "'T", "\n", " go", " "]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", "!DON", "'T", "\n", " go", " "]),
        ("llama3", ["It", "'s", " ", "202", "4", "!DON", "'T", "\n", " go", " "]),
    ],
)
def test_each_pre_tokenizer_cuts_words_its_own_way(pre, words):
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre, "t s"))
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("It's 2024!DON'T\n go ")
    assert [tokenizer.backend.decoder.decode([piece]) for piece, _ in pieces] == words


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
@given(text=st.text())
def test_byte_level_text_comes_back_whole(pre, text):
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre, "a b", "ab c", add_bos_token=False))
    normalizer = tokenizer.backend.normalizer
    expected = normalizer.normalize_str(text) if normalizer else text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == expected


def test_merges_apply_by_rank_and_stop_at_words():
    tokenizer = tokenizer_from_gguf(byte_level_metadata("gpt-2", "b c", "a b", "a bc"))
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("abc ab")]
    assert names == ["abc", "Ġ", "ab"]


def test_control_tokens_are_special_and_user_defined_ones_are_text():
    tokenizer = tokenizer_from_gguf(byte_level_metadata("smollm", "t o"))
    ids = tokenizer.encode("a<|end|><tool>")
    end = tokenizer.eos_token_ids[0]
    assert ids[1:] == [end, end + 1]
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|><tool>"


def test_bos_is_added_where_the_file_or_its_kind_says_so():
    bos = tokenizer_from_gguf(byte_level_metadata("qwen2", "t o")).bos_token_id
    for pre, extra, begins in [
        ("qwen2", {}, False),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {"add_bos_token": True}, True),
    ]:
        tokenizer = tokenizer_from_gguf(byte_level_metadata(pre, "t o", **extra))
        assert (tokenizer.encode("to")[0] == bos) == begins
        assert bos not in tokenizer.encode("to", add_special_tokens=False)


def test_eos_is_added_after_the_text_where_the_file_says_so():
    extra = {"add_bos_token": True, "add_eos_token": True, "eos_token_id": 40}
    tokenizer = tokenizer_from_gguf(byte_level_metadata("qwen2", "t o", **extra))
    first, middle, last = tokenizer.encode("to")
    assert (first, last) == (tokenizer.bos_token_id, 40)
    assert tokenizer.decode([middle]) == "to"


def test_every_end_id_of_the_file_counts():
    metadata = byte_level_metadata("qwen2", "t o", eos_token_id=5, eot_token_id=3, eom_token_id=5)
    assert tokenizer_from_gguf(metadata).eos_token_ids == (5, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre": "command-r"}, "'command-r' is not supported.*smollm.*llama-spm"),
        ({"pre": "default"}, "'default' is not supported"),
        ({"model": "bert"}, "'bert' is not supported.*gpt2"),
        ({"token_type": [1, 1]}, "259 tokens but 2 token types"),
        ({"merges": []}, "no tokenizer.ggml.merges"),
        ({"tokens": []}, "no tokenizer.ggml.tokens"),
    ],
)
def test_another_kind_of_gguf_tokenizer_is_refused_by_name(change, words):
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    metadata = byte_level_metadata("smollm", "t o") | changed
    with pytest.raises(ValueError, match=words):
        tokenizer_from_gguf(metadata)


# The earlier, the better.
PIECES = [*"▁abcdé", "ab", "bc", "cd", "abc", "▁a", "▁ab", "▁abc", "da", "dab", "▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<mark>"]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))] + [0.0]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES) + [USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def pieces_of(text: str, **extra: Any) -> list[str | None]:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(**extra))
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_sentencepiece_merges_the_best_score_first():
    assert pieces_of("abc") == ["<s>", "▁abc"]
    # In "dab" ab goes first, then dab; in "dabc" ab, then abc, which leaves d alone.
    assert pieces_of("bcdab", add_space_prefix=False)[1:] == ["bc", "dab"]
    assert pieces_of("dabc", add_space_prefix=False)[1:] == ["d", "abc"]


def test_sentencepiece_falls_back_to_bytes_and_takes_them_back():
    assert pieces_of("a😀")[1:] == ["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata())
    assert tokenizer.decode(tokenizer.encode("a😀é  b\n")) == "a😀é  b\n"


def test_sentencepiece_puts_a_space_first_and_after_a_token_in_the_text():
    assert pieces_of("ab</s>ab<mark>c") == ["<s>", "▁ab", "</s>", "▁ab", "<mark>", "▁", "c"]
    assert pieces_of("ab</s>ab", add_space_prefix=False) == ["<s>", "ab", "</s>", "ab"]


def test_sentencepiece_adds_bos_unless_the_file_forbids_it():
    assert pieces_of("a") == ["<s>", "▁a"]
    assert pieces_of("a", add_bos_token=False) == ["▁a"]
    assert pieces_of("") == ["<s>"]


@given(text=st.text(alphabet="abcd é😀", max_size=24))
def test_sentencepiece_agrees_with_its_textbook_form(text):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(add_bos_token=False))
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]
    assert names == textbook_sentencepiece(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def textbook_sentencepiece(text: str) -> list[str]:
    """Joins the neighbours whose union scores best, the leftmost of equals, until none is known."""
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(PIECES.index(pair), i) for i, pair in enumerate(pairs) if pair in PIECES]
        if not known:
            break
        _, i = min(known)
        symbols[i : i + 2] = [pairs[i]]
    names: list[str] = []
    for symbol in symbols:
        names += [symbol] if symbol in PIECES else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return names


def write_tokenizer(directory: pathlib.Path, **settings: Any) -> pathlib.Path:
    """Words w0 to w6 with ids 0 to 6, then <unk>, <s> and </s>."""
    vocab = {f"w{i}": i for i in range(7)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab | {"<unk>": 7}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", settings)
    return directory


def test_a_text_is_neither_cut_nor_padded(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.encode("w1 w2 w3 w4 w5 w6 w0") == [1, 2, 3, 4, 5, 6, 0]
    assert tokenizer.vocab_size == 10


def test_special_tokens_are_found_as_text_as_dict_and_in_their_own_file(tmp_path):
    write_tokenizer(tmp_path, eos_token={"content": "</s>", "special": True})
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "w3"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (8, (9,))


def test_ids_of_the_config_join_those_of_the_tokenizer(tmp_path):
    write_tokenizer(tmp_path, eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path, bos_token_id=4, eos_token_ids=(6, 9))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (4, (6, 9))
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=(5,))
    assert tokenizer.eos_token_ids == (5, 9)


def test_add_bos_token_in_the_settings_decides(tmp_path):
    write_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert load_tokenizer(tmp_path).encode("w1") == [8, 1]
    write_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=False)
    assert load_tokenizer(tmp_path).encode("w1") == [1]


def test_the_post_processor_of_the_file_stands_where_the_settings_are_silent(tmp_path):
    write_tokenizer(tmp_path, bos_token="<s>")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 8), ("</s>", 9)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("w1") == [8, 1, 9]
    assert tokenizer.encode("w1", add_special_tokens=False) == [1]


def test_tokens_that_only_the_settings_know_are_added_under_their_ids(tmp_path):
    write_tokenizer(
        tmp_path,
        added_tokens_decoder={
            "10": {"content": "<x>", "special": True},
            "11": {"content": "<y>", "special": False},
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("w1<x>w2<y>") == [1, 10, 2, 11]
    assert tokenizer.decode([1, 10, 2, 11]) == "w1 w2 <y>"


def test_tokens_whose_ids_disagree_are_refused(tmp_path):
    write_tokenizer(tmp_path, added_tokens_decoder={"12": {"content": "<x>"}})
    with pytest.raises(ValueError, match=r"'<x>' the id 12, tokenizer\.json gives it 10"):
        load_tokenizer(tmp_path)


def test_a_chat_template_is_read_from_each_of_its_places(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(write_tokenizer(tmp_path)).chat_template is None
    write_tokenizer(tmp_path, eos_token="</s>", chat_template="A{{ eos_token }}")
    chat = load_tokenizer(tmp_path).chat_template
    assert chat is not None
    assert chat.render(messages) == "A</s>"
    named = [{"name": "default", "template": "B"}, {"name": "tool_use", "template": "C"}]
    write_tokenizer(tmp_path, chat_template=named)
    chat = load_tokenizer(tmp_path).chat_template
    assert chat is not None
    assert (chat.render(messages), chat.render(messages, tools=[])) == ("B", "C")
    (tmp_path / "chat_template.jinja").write_text("D", encoding="utf-8")
    chat = load_tokenizer(tmp_path).chat_template
    assert chat is not None
    assert (chat.render(messages), chat.render(messages, tools=[])) == ("D", "C")


def test_a_broken_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nope"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
