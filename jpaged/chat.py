"""A conversation in the terminal: `jpaged chat`."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from jpaged.errors import JpagedError
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged_models import DEFAULT_MODEL, Tokenizer, open_checkpoint

HELP = (
    "Ctrl-C stops an answer, or clears the line; /reset forgets the conversation; /help says this; "
    "/exit, or Ctrl-D, ends it."
)
PROMPT = "> "

Message = dict[str, str]


class Chat:
    """A history, and the model's answers to it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._limits = llm.engine.scheduler.config
        self._llm = llm
        self._tokenizer = _checked(llm.tokenizer, llm.model_source)
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
        pieces: list[str] = []
        messages = self._fitting([*self.history, _message("user", text)])
        with contextlib.suppress(KeyboardInterrupt):
            # Closed here and not when it is collected: that frees the blocks.
            stream: Any = self._llm.stream(self._tokens(messages), self._params)
            with contextlib.closing(stream):
                for delta in stream:
                    pieces.append(delta.text)
                    write(delta.text)
        # At once: a second interrupt leaves no question without an answer.
        self.history = [*messages, _message("assistant", "".join(pieces))]

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """Without the oldest questions and their answers, where all leave no room for another."""
        limits = self._limits
        # A pool may be smaller than the context. The last token's keys and values are never held.
        longest = min(limits.max_model_len, (limits.num_blocks - 1) * limits.block_size + 1)
        room = min(self._params.max_tokens or 1, longest // 2)
        while len(self._tokens(messages)) + room > longest and len(messages) > 1:
            messages = messages[2:]
        return messages

    def _tokens(self, messages: list[Message]) -> list[int]:
        return self._tokenizer.apply_chat_template([*self._system, *messages])


def check_model(model: str | os.PathLike | None, *, revision: str | None = None) -> None:
    """Raises ValueError where the model has no chat template; loads no weights."""
    with contextlib.closing(open_checkpoint(model, revision=revision)) as checkpoint:
        _checked(checkpoint.tokenizer, checkpoint.source)


def run(chat: Chat) -> None:
    """Reads questions and writes answers until the reader has enough."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - what makes input() know arrows and history
    print(HELP, file=sys.stderr)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            text = input(PROMPT if is_terminal else "").strip()
            if text == "/exit":
                return
            _obey(chat, text)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt, or a second one right after an answer's
            if not sys.stdin.isatty():
                raise
            print(file=sys.stderr)


def _obey(chat: Chat, text: str) -> None:
    if text == "/reset":
        chat.reset()
    elif text == "/help":
        print(HELP, file=sys.stderr)
    elif text:
        _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        chat.answer(text, lambda piece: print(piece, end="", flush=True))
    except (ValueError, TypeError, JpagedError) as error:  # it is too long, say
        print(f"jpaged: {error}", file=sys.stderr)
    print()


def _checked(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            f"{source} has no chat template, so it knows no conversation; leave MODEL out for "
            f"{DEFAULT_MODEL}, or continue a text with `jpaged generate PROMPT --stream`"
        )
    return tokenizer


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
