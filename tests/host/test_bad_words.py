"""Bad words as token ids: how a text is spelled, and what may not come next."""

from typing import ClassVar

import numpy as np
import pytest

from jpaged.bad_words import always_forbidden, forbidden_next, most_forbidden, word_ids


class Spelling:
    """Spells a few texts by hand, as a byte-pair tokenizer might."""

    known: ClassVar = {
        "new": [4, 5],
        " new": [6],
        "york": [7],
        " york": [3, 7],
        "new york": [4, 5, 8],
    }

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "a word in the middle of a text has none"
        return self.known.get(text, [])


def test_a_text_is_forbidden_with_and_without_a_space_before_it():
    words = ["new", "  york", [9, 9], (4, 5)]
    assert word_ids(words, Spelling()) == ((4, 5), (6,), (7,), (3, 7), (9, 9))
    assert always_forbidden(word_ids(words, Spelling())) == {6, 7}


def test_a_text_needs_a_tokenizer_and_tokens():
    with pytest.raises(ValueError, match="need a tokenizer"):
        word_ids(["new"], None)
    with pytest.raises(ValueError, match="has no tokens"):
        word_ids(["unknown"], Spelling())


def test_a_word_is_found_at_every_place_and_never_too_early():
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = tuple(tuple(rng.integers(0, 3, rng.integers(1, 5)).tolist()) for _ in range(6))
        token_ids = rng.integers(0, 3, rng.integers(1, 9)).tolist()
        completing = {
            token
            for token in range(3)
            for word in words
            if len(word) > 1 and [*token_ids, token][-len(word) :] == list(word)
        }
        assert forbidden_next(words, token_ids) == completing
        assert len(completing) <= most_forbidden(words)
