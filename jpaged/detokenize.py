"""Text from tokens as they come, and the stop strings in it."""

from collections.abc import Sequence
from typing import Protocol

import tokenizers

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
PROMPT_TAIL = 5  # prompt tokens decoded along, so that the first word keeps its leading space
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one


class HasBackend(Protocol):
    """A tokenizer of ours, of which only the `tokenizers` object is used."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The object that decodes."""
        ...


class Detokenizer:
    """The text of one sequence, which only grows.

    `feed` takes the whole token list (prompt, then output) and catches up with it, one token at a
    time, so the text does not depend on how the tokens were cut into calls. `text` never ends in a
    part of a character, nor, before `finish`, in what may be the start of a stop string. A stop
    string that ends within the first `min_tokens` tokens does not count.

    Tokens are decoded in a window that starts some tokens early, since a decoder may treat the
    start of its input differently (`▁` is dropped there); `DecodeStream` does the same but fails
    where bytes turn out to be no character.
    """

    def __init__(
        self,
        tokenizer: HasBackend,
        *,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        stop: Sequence[str],
        include_stop_str_in_output: bool,
        min_tokens: int = 0,
    ) -> None:
        self._backend = tokenizer.backend
        self._skip_special_tokens = skip_special_tokens
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_prompt_tokens = len(prompt_token_ids)
        self._special_ids = _special_ids(self._backend) if skip_special_tokens else frozenset()
        self._start(self._prompt_tail(prompt_token_ids))

    def reset(self) -> None:
        """Forgets everything but the prompt: the way back when a call was interrupted."""
        self._start(self._tail)

    @property
    def text(self) -> str:
        """All settled text so far."""
        return self._text[: len(self._text) - self._num_held]

    def feed(self, token_ids: Sequence[int]) -> str | None:
        """Catches up with `token_ids`, prompt included; the stop string that matched, or None.

        Once a stop string matched, the text is final and further tokens are ignored.
        """
        while self._matched is None and self._position < len(token_ids):
            delta = self._push(token_ids[self._position])
            self._position += 1
            if delta:
                self._append(delta)
        return self._matched

    def finish(self) -> None:
        """Settles the text: what was held back as a possible stop string is text after all."""
        self._num_held = 0

    def _start(self, tail: list[int]) -> None:
        self._tail = tail
        self._position = self._num_prompt_tokens
        self._text = ""
        self._num_held = 0
        self._matched: str | None = None
        self._window: list[int] = []
        self._num_old = 0  # of the window's tokens, those before the newest text
        self._shown = ""  # of the window's text, what is settled
        for token in tail:
            self._push(token)

    def _prompt_tail(self, token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from one that does not start within a character."""
        tail = token_ids[-(PROMPT_TAIL + MAX_CHARACTER_TOKENS) :]
        tail = [token for token in tail if self._is_text(token)]
        for start in range(max(0, len(tail) - PROMPT_TAIL), 0, -1):
            for end in range(start + 1, start + MAX_CHARACTER_TOKENS + 1):
                if not self._decode(tail[start:end]).startswith(BROKEN):
                    return tail[start:]
        return tail

    def _push(self, token: int) -> str:
        """The text that `token` settles."""
        if not self._is_text(token):
            return ""
        self._window.append(token)
        decoded = self._decode(self._window)
        stable = decoded.rstrip(BROKEN)
        if stable != decoded:
            self._shown, delta = _grown(self._shown, stable)
            return delta + self._settle_broken(decoded)
        if decoded.startswith(self._shown):
            delta = decoded[len(self._shown) :]
        else:
            # Byte tokens that were characters became broken with the bytes after them. What was
            # shown stays; the tokens since then are decoded alone.
            delta = self._decode(self._window[self._num_old :])
        if delta:
            self._slide(len(self._window), decoded, decoded)
        return delta

    def _settle_broken(self, decoded: str) -> str:
        """The broken text that no later token can mend; the window stays short in a long run.

        At `cut`, the two sides must decode apart as they do together: no character crosses it.
        """
        cut = len(self._window) - MAX_CHARACTER_TOKENS
        if cut <= self._num_old:
            return ""
        left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
        if not right or left + right != decoded:
            return ""
        shown, delta = _grown(self._shown, left)
        self._slide(cut, decoded, shown)
        return delta

    def _slide(self, num_settled: int, decoded: str, shown: str) -> None:
        """Starts the window where its newest text started; `decoded` was its text so far."""
        window = self._window[self._num_old :]
        dropped = len(decoded) - len(self._decode(window))
        self._num_old = num_settled - self._num_old
        self._window = window
        self._shown = shown[dropped:]

    def _append(self, delta: str) -> None:
        start = len(self._text)
        self._text += delta
        num_output = self._position - self._num_prompt_tokens
        found = self._find_stop(start) if num_output > self._min_tokens else None
        if found is None:
            self._num_held = self._possible_stop()
            return
        begin, self._matched = found
        end = begin + len(self._matched) if self._include_stop else begin
        self._text = self._text[:end]
        self._num_held = 0

    def _find_stop(self, start: int) -> tuple[int, str] | None:
        """The stop string that ends first in the text after `start`, the longest of several."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            begin = self._text.find(stop, max(0, start - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _possible_stop(self) -> int:
        """The length of the longest tail that is the start of a stop string."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._text)), 0, -1)
            if self._text.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _is_text(self, token: int) -> bool:
        # A model's vocabulary may be padded beyond the tokenizer's; such ids have no text. Dropping
        # all of these here keeps the window short in a run of them.
        return token not in self._special_ids and self._backend.id_to_token(token) is not None

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _grown(shown: str, text: str) -> tuple[str, str]:
    """`text` and what it adds to `shown`, or `shown` and nothing where it does not continue it."""
    return (text, text[len(shown) :]) if text.startswith(shown) else (shown, "")


def _special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    added = backend.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)
