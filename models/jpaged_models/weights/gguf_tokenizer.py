"""GGUF metadata as a Tokenizer: byte-level BPE, and SentencePiece of Llama's kind."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jpaged_models.chat_template import ChatTemplate
from jpaged_models.tokenizer import Tokenizer, add_template, unique_ids
from jpaged_models.weights.gguf_config import end_token_ids

MODEL_KEY = "tokenizer.ggml.model"
NO_VOCABULARY = "no_vocab"
# GGUF's token types that are not plain text.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
SPACE = "\u2581"  # SentencePiece's visible space

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how many digits of a number stay together; None: GPT-2's own words.
SPLIT_WORDS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file brings a tokenizer at all."""
    return metadata.get(MODEL_KEY, NO_VOCABULARY) != NO_VOCABULARY


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes, with Hugging Face's ids."""
    model = metadata[MODEL_KEY]
    if model not in {"gpt2", "llama"}:
        raise ValueError(
            f"GGUF tokenizer model {model!r} is not supported; supported are gpt2 (BPE) and llama "
            "(SentencePiece)"
        )
    tokens: list[str] = _array(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens but {len(kinds)} token types")
    if model == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens)
    else:
        backend, adds_bos = _sentencepiece(metadata, tokens, kinds), True
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in {CONTROL, USER_DEFINED}
        ]
    )
    bos = metadata.get("tokenizer.ggml.bos_token_id", 1 if model == "llama" else None)
    ends = end_token_ids(metadata) or ((2,) if model == "llama" else ())
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    if adds_bos or adds_eos:
        add_template(backend, bos if adds_bos else None, ends[0] if adds_eos and ends else None)
    return Tokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=unique_ids(ends),
        chat_template=_chat_template(metadata, tokens, bos, ends),
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """A BPE over bytes, and whether its kind begins a text with bos where the file is silent."""
    named = metadata.get("tokenizer.ggml.pre", "missing")
    pre = ALIASES.get(named, named)
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"GGUF pre-tokenizer {named!r} is not supported; supported are "
            f"{', '.join(PRE_TOKENIZERS)} and llama-spm; load the model's Hugging Face directory "
            "instead"
        )
    # A token may begin with a space, so the one that divides comes after the first character.
    merges = [
        (merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :])
        for merge in _array(metadata, "tokenizer.ggml.merges")
    ]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    if pre in SPLIT_WORDS:
        words = tokenizers.Regex(_WORDS % SPLIT_WORDS[pre])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, pre == "llama-bpe"


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    """A BPE whose merges are ordered by score, which is how SentencePiece's BPE picks them."""
    scores = _array(metadata, "tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens but {len(scores)} scores")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    plain = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind not in {UNKNOWN, CONTROL, BYTE}
    }
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(vocab, plain),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    to_visible = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), to_visible]) if adds_space else to_visible
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps
    )
    return backend


def _merges_by_score(vocab: Mapping[str, int], plain: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, best score first, ties as Transformers breaks them."""
    found: list[tuple[float, str, str]] = []
    for token, score in plain.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in plain and right in plain]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, left, right) for left, right in known]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _chat_template(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    bos: int | None,
    ends: Sequence[int],
) -> ChatTemplate | None:
    """The file's template, and those it holds under names of their own."""
    sources = {
        key.removeprefix("tokenizer.chat_template.").replace(
            "tokenizer.chat_template", "default"
        ): v
        for key, v in metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(v, str)
    }
    if not sources:
        return None
    ids = itertools.chain([("bos_token", bos)], [("eos_token", ends[0])] if ends else [])
    special = {
        name: tokens[token_id]
        for name, token_id in ids
        if token_id is not None and token_id < len(tokens)
    }
    return ChatTemplate(sources=sources, special_tokens=special)


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f"the GGUF file has no {key}; it needs the tokenizer of its own model")
    return values
