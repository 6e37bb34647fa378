"""Chat templates run as Transformers runs them."""

import pytest

from jpaged_models.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(sources={"default": source}, special_tokens=special_tokens)


def test_messages_special_tokens_and_generation_prompt_reach_the_template():
    chat = template(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        bos_token="<s>",
        eos_token="</s>",
    )
    assert chat.render(MESSAGES) == "<s>[user]hi</s>[assistant]yo</s>[assistant]"
    assert chat.render(MESSAGES, add_generation_prompt=False).endswith("yo</s>")


def test_blocks_leave_no_blank_lines():
    chat = template(
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n"
        "{% endfor %}\nend"
    )
    assert chat.render(MESSAGES) == "hi\nyo\nend"


def test_variables_of_the_caller_reach_the_template():
    chat = template("{{ 'off' if enable_thinking is false else 'on' }}")
    assert chat.render(MESSAGES) == "on"
    assert chat.render(MESSAGES, enable_thinking=False) == "off"


def test_tools_pick_their_own_template_and_json_is_not_escaped():
    chat = ChatTemplate(
        sources={"default": "plain {{ tools is none }}", "tool_use": "{{ tools | tojson }}"}
    )
    assert chat.render(MESSAGES) == "plain True"
    assert chat.render(MESSAGES, tools=[{"name": "é<b>"}]) == '[{"name": "é<b>"}]'


def test_loop_controls_and_generation_marks_are_known():
    chat = template(
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    )
    assert chat.render(MESSAGES) == "yo!"


def test_the_date_is_today():
    assert template("{{ strftime_now('%Y') }}").render(MESSAGES).startswith("20")


def test_a_template_that_refuses_says_why():
    chat = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        chat.render(MESSAGES)


def test_a_broken_template_is_refused_when_it_is_read():
    with pytest.raises(ValueError, match="not valid jinja2"):
        template("{% for %}")


def test_several_templates_without_a_default_are_refused_when_used():
    chat = ChatTemplate(sources={"rag": "x", "tool_use": "y"})
    with pytest.raises(ValueError, match="rag, tool_use"):
        chat.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(ValueError, match="refused"):
        template(source).render(list(MESSAGES))
