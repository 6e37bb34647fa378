"""Conversations as a chat template gets them, and what is refused before it does."""

import copy
from typing import Any

import pytest

from jpaged.messages import as_conversations

HELLO = {"role": "user", "content": "Hello"}
CALL: dict[str, Any] = {"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_one_conversation_and_several_become_a_list_of_them():
    assert as_conversations([HELLO, HELLO]) == [[HELLO, HELLO]]
    assert as_conversations((HELLO,)) == [[HELLO]]
    assert as_conversations([[HELLO], (HELLO, HELLO)]) == [[HELLO], [HELLO, HELLO]]


def test_text_parts_are_joined_and_the_caller_s_message_stays_as_it_was():
    messages = [HELLO, *user([text("look:"), text(""), text("a b")])]
    before = copy.deepcopy(messages)
    assert as_conversations(messages) == [[HELLO, *user("look:\n\na b")]]
    assert messages == before


def test_other_keys_are_kept_and_a_call_of_tools_needs_no_content():
    result = {"role": "tool", "content": "12:00", "tool_call_id": "x", "name": "now"}
    silent = CALL | {"content": None}
    assert as_conversations([CALL, silent, result]) == [[CALL, silent, result]]
    with_parts = as_conversations([CALL | {"content": [text("Let me see")]}])
    assert with_parts == [[CALL | {"content": "Let me see"}]]


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (None, TypeError, "list of such lists; got NoneType"),
        (HELLO, TypeError, "got dict"),
        ("Hello", TypeError, "got str"),
        (3, TypeError, "got int"),
        (b"Hello", TypeError, "got bytes"),
        ({3}, TypeError, "got set"),
        ([], ValueError, "no messages"),
        ([[]], ValueError, "a conversation is empty"),
        ([[HELLO], []], ValueError, "a conversation is empty"),
        (["Hello"], TypeError, "got str in place of such a list"),
        ([None], TypeError, "got NoneType in place of such a list"),
        ([HELLO, [HELLO]], TypeError, "got list in place of such a dict"),
        ([[HELLO], HELLO], TypeError, "got dict in place of such a list"),
        ([[[HELLO]]], TypeError, "got list in place of such a dict"),
        ([HELLO, "Hello"], TypeError, "got str in place of such a dict"),
        ([{}], ValueError, r"without \['content', 'role'\]"),
        ([{"role": "user"}], ValueError, r"without \['content'\]"),
        ([{"role": "user", "text": "Hello"}], ValueError, r"without \['content'\]"),
        ([{"content": "Hello"}], ValueError, r"without \['role'\]"),
        ([{"tool_calls": [3]}], ValueError, r"without \['role'\]"),
        ([HELLO | {"role": 3}], TypeError, "role must be a string, got 3"),
        ([HELLO | {"role": None}], TypeError, "role must be a string, got None"),
        ([HELLO | {"role": ""}], ValueError, "role is empty"),
        (user(None), TypeError, "text or a list of text parts, got NoneType"),
        (user(3), TypeError, "got int"),
        (user(text("a")), TypeError, "got dict"),
        (user("a\ud800"), ValueError, r"lone surrogate '\\ud800' at 1"),
        (user([]), ValueError, "an empty list"),
        (user(["Hello"]), TypeError, "'type': 'text'.* got str"),
        (user([{"text": "Hello"}]), ValueError, "has the type None"),
        (user([text("a"), {"type": "image_url"}]), ValueError, "has the type 'image_url'"),
        (user([{"type": "input_audio"}]), ValueError, "has the type 'input_audio'"),
        (user([{"type": "text"}]), TypeError, "text of a part .* must be a string, got None"),
        (user([{"type": "text", "text": ["a"]}]), TypeError, "must be a string"),
    ],
    ids=lambda value: str(value)[:40].encode(errors="replace").decode(),
)
def test_what_is_no_conversation_is_refused(messages: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        as_conversations(messages)
