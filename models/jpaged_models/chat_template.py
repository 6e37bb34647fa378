"""A model's own chat template: messages in, one prompt out."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A jinja2 template, or several by name, run in a sandbox as Transformers runs them.

    A prompt made here already holds the tokens that begin a text, so encode it with
    `add_special_tokens=False`.
    """

    sources: Mapping[str, str]  # by name; "default" is the one used
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    _compiled: dict[str, jinja2.Template] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        environment = _environment()
        for name, source in self.sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(
                    f"the model's chat template {name!r} is not valid jinja2: {error}; pass text "
                    "prompts instead of messages"
                ) from error

    def render(
        self,
        messages: list[dict],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: dicts with at least `role` and `content`, oldest first.
            add_generation_prompt: end with the words that open the assistant's turn.
            tools: JSON schemas of functions the model may call.
            variables: whatever else the template reads, `enable_thinking` for one.
        """
        template = self._chosen(tools)
        names = {**self.special_tokens, **variables}
        try:
            return template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refused the messages: {error}") from error

    def _chosen(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools is not None and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" in self._compiled:
            return self._compiled["default"]
        raise ValueError(
            "the model has several chat templates and none is called 'default': "
            f"{', '.join(self.sources)}"
        )


class _GenerationTag(jinja2.ext.Extension):
    """Lets `{% generation %}` through, which marks assistant text for training, as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    # jinja2's own tojson escapes HTML and non-ASCII; no model was trained on that.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
