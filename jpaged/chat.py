"""A conversation in the terminal: `jpaged chat`."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from jpaged.errors import JpagedError
from jpaged.llm import LLM
from jpaged.params import SamplingParams

HELP = "Ctrl-C stops an answer; /reset forgets the conversation; /exit, or Ctrl-D, ends it."
PROMPT = "> "

Message = dict[str, str]


class Chat:
    """A history, and the model's answers to it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise ValueError(
                f"{llm.model_source} has no chat template, so it knows no conversation; "
                "`jpaged generate PROMPT --stream` continues a text"
            )
        self._llm = llm
        self._params = params
        self._system: list[Message] = [] if system is None else [_message("system", system)]
        self.history: list[Message] = []

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.history = []

    def answer(self, text: str, write: Callable[[str], object]) -> None:
        """Writes the answer piece by piece as it comes, and remembers it.

        What was written when somebody interrupts is remembered too, the interrupt ends here. What
        is refused, or fails, leaves the history as it was.
        """
        before = list(self.history)
        self.history.append(_message("user", text))
        pieces: list[str] = []
        try:
            self._shorten()
            # Closed here and not when it is collected: that frees the blocks.
            stream: Any = self._llm.stream(self._tokens(), self._params)
            with contextlib.closing(stream):
                for delta in stream:
                    pieces.append(delta.text)
                    write(delta.text)
        except KeyboardInterrupt:
            pass
        except BaseException:
            self.history = before
            raise
        self.history.append(_message("assistant", "".join(pieces)))

    def _shorten(self) -> None:
        """Drops the oldest question with its answer while question and answer do not fit."""
        longest = self._llm.engine.scheduler.config.max_model_len
        room = min(self._params.max_tokens or 1, longest // 2)
        while len(self._tokens()) + room > longest and len(self.history) > 1:
            del self.history[:2]

    def _tokens(self) -> list[int]:
        assert self._llm.tokenizer is not None, "looked at first"
        return self._llm.tokenizer.apply_chat_template([*self._system, *self.history])


def run(chat: Chat) -> None:
    """Reads questions and writes answers until the reader has enough."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - what makes input() know arrows and history
    print(HELP, file=sys.stderr)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            text = input(PROMPT if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        chat.answer(text, lambda piece: print(piece, end="", flush=True))
    except (ValueError, TypeError, JpagedError) as error:  # it is too long, say
        print(f"jpaged: {error}", file=sys.stderr)
    print()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
