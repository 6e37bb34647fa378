"""Words that must not come, as token ids: the last token is forbidden once the others stand there.

As in Transformers' `NoBadWordsLogitsProcessor`, the tokens before the last one may stand anywhere
in the sequence, the prompt included (vLLM looks at generated tokens alone). A text is forbidden as
its tokenizer spells it; spelled by other tokens it can still come, as in both.
"""

from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import Protocol

WordIds = tuple[tuple[int, ...], ...]


class Encoder(Protocol):
    """What a tokenizer must be able to do."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`."""
        ...


def word_ids(words: Collection[str | SequenceOf[int]], encoder: Encoder | None) -> WordIds:
    """Each word's token ids, those of a text with and without a space before it, as vLLM does.

    Both are kept however many tokens they have: vLLM drops the second where the numbers differ,
    and the word then comes behind a space.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(tuple(word))
            continue
        if encoder is None:
            raise ValueError("bad_words as text need a tokenizer and this model has none")
        text = word.lstrip()
        forms = [encoder.encode(t, add_special_tokens=False) for t in (text, " " + text)]
        if not forms[0]:
            raise ValueError(f"the bad word {word!r} has no tokens; expected at least one")
        found += map(tuple, forms)
    return tuple(dict.fromkeys(found))


def always_forbidden(words: WordIds) -> set[int]:
    """The words of one token."""
    return {word[0] for word in words if len(word) == 1}


def forbidden_next(words: WordIds, token_ids: SequenceOf[int]) -> set[int]:
    """The tokens that would complete a longer word at the end of `token_ids`."""
    last = token_ids[-1]
    return {
        word[-1]
        for word in words
        if len(word) > 1 and word[-2] == last and _ends_with(token_ids, word[:-1])
    }


def most_forbidden(words: WordIds) -> int:
    """A bound on the size of `forbidden_next`: all that match end in the same last but one."""
    followers = defaultdict(set)
    for word in words:
        if len(word) > 1:
            followers[word[-2]].add(word[-1])
    return max(map(len, followers.values()), default=0)


def _ends_with(token_ids: SequenceOf[int], end: tuple[int, ...]) -> bool:
    return tuple(token_ids[-len(end) :]) == end
