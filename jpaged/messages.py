"""What callers pass as conversations, checked and made into what a chat template reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpaged.params import checked_text

_EXPECTED = "messages are a list of dicts such as {'role': 'user', 'content': 'Hello'}"


def as_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """A list of conversations from one or several; the content of every message is text.

    Text that comes in parts, as in OpenAI's format, is joined line by line, as vLLM does. A call
    of tools may come without content; keys other than role and content are left as they are.
    """
    if not _is_list(messages):
        raise TypeError(f"{_EXPECTED}, or a list of such lists; got {type(messages).__name__}")
    if not messages:
        raise ValueError("there are no messages; expected at least one")
    is_single = isinstance(messages[0], Mapping)
    return [_conversation(one) for one in ([messages] if is_single else messages)]


def _conversation(messages: Any) -> list[dict[str, Any]]:
    if not _is_list(messages):
        raise TypeError(f"{_EXPECTED}; got {type(messages).__name__} in place of such a list")
    if not messages:
        raise ValueError("a conversation is empty; expected at least one message")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{_EXPECTED}; got {type(message).__name__} in place of such a dict")
    needed = {"role"} if message.get("tool_calls") else {"role", "content"}
    if missing := sorted(needed - set(message)):
        raise ValueError(f"a message needs role and content, got one without {missing}")
    if not checked_text("a message's role", message["role"]):
        raise ValueError("a message's role is empty; expected 'user', 'assistant' or 'system'")
    content = message.get("content")
    if content is None and "content" not in needed:
        return dict(message)
    return {**message, "content": _text(content)}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return checked_text("a message's content", content)
    if not _is_list(content):
        raise TypeError(
            f"a message's content is text or a list of text parts, got {type(content).__name__}"
        )
    if not content:
        raise ValueError("a message's content is an empty list; expected at least one text part")
    return "\n".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise TypeError(
            "a part of a message's content is a dict such as {'type': 'text', 'text': 'Hello'}, "
            f"got {type(part).__name__}"
        )
    if part.get("type") != "text":
        raise ValueError(
            f"a part of a message's content has the type {part.get('type')!r}; the models here "
            "read text alone, so every part must have the type 'text'"
        )
    return checked_text("the text of a part of a message's content", part.get("text"))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
