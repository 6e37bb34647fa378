"""Text to token ids and back, with the ids that begin and end a text."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from jpaged_models.chat_template import ChatTemplate
from jpaged_models.config import ModelConfig

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A `tokenizers` backend and what a checkpoint says about its special tokens."""

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    vocab_size: int = dataclasses.field(init=False)  # one above the largest id

    def __post_init__(self) -> None:
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        object.__setattr__(self, "vocab_size", largest + 1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; text that spells a special token becomes that token."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(self, messages: list[dict], **variables: Any) -> list[int]:
        """The ids of a conversation, as the model's own template writes it out.

        Args:
            messages: dicts with at least `role` and `content`, oldest first.
            variables: what `ChatTemplate.render` takes, `add_generation_prompt=False` for one.

        Raises:
            ValueError: the model has no template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; write the prompt out and encode it")
        text = self.chat_template.render(messages, **variables)
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, with U+FFFD where bytes are not whole characters."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def load_tokenizer(
    directory: pathlib.Path,
    *,
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
        directory: holds tokenizer.json and, where the model has them, tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja.
        bos_token_id: the network config's, used where the tokenizer's files name none.
        eos_token_ids: the network config's; the tokenizer's own eos joins them.
    """
    path = directory / TOKENIZER_FILE
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer that `tokenizers` reads: {error}; save it anew with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(directory)"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    settings = read_json(directory / "tokenizer_config.json")
    special = _special_tokens(read_json(directory / "special_tokens_map.json"), settings)
    _add_missing_tokens(backend, settings.get("added_tokens_decoder") or {}, special.values())
    bos = _token_id(backend, special.get("bos_token"))
    bos_token_id = bos_token_id if bos is None else bos
    eos = _token_id(backend, special.get("eos_token"))
    if "add_bos_token" in settings:
        add_template(
            backend,
            bos_token_id if settings["add_bos_token"] else None,
            eos if settings.get("add_eos_token") else None,
        )
    return Tokenizer(
        backend=backend,
        bos_token_id=bos_token_id,
        eos_token_ids=unique_ids((*eos_token_ids, eos)),
        chat_template=_chat_template(directory, settings, special),
    )


def tokenizer_in(directory: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer that lies beside a network's weights, or None where there is none.

    Raises ValueError for one that cannot be read.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    return load_tokenizer(
        directory, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids
    )


def save_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes the files that `load_tokenizer` reads."""
    tokenizer.backend.save(str(directory / TOKENIZER_FILE))
    template = tokenizer.chat_template
    special = dict(template.special_tokens) if template else {}
    # The last of the ids that end a text is the tokenizer's own, if the config does not have it
    # too; a template knows which one it is.
    eos = tokenizer.eos_token_ids[-1] if tokenizer.eos_token_ids else None
    own = {"bos_token": tokenizer.bos_token_id, "eos_token": eos}
    for name, token_id in own.items():
        token = None if token_id is None else tokenizer.backend.id_to_token(token_id)
        if token is not None:
            special.setdefault(name, token)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(special, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, source in (template.sources if template else {}).items():
        path = directory / "chat_template.jinja"
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"a chat template's name must be that of a file, got {name!r}")
        if name != "default":
            path = directory / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def add_template(
    backend: tokenizers.Tokenizer, bos_token_id: int | None, eos_token_id: int | None
) -> None:
    """Makes `backend` put these ids around a text encoded with its special tokens."""
    pieces, special = ["$A:0"], []
    for token_id, place in ((bos_token_id, 0), (eos_token_id, len(pieces) + 1)):
        if token_id is None:
            continue
        token = backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"the tokenizer has no token of id {token_id} to put around a text")
        pieces.insert(place, f"{token}:0")
        special.append((token, token_id))
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


def unique_ids(ids: Iterable[int | None]) -> tuple[int, ...]:
    """The ids that are there, each once, in order."""
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")  # noqa: TRY004
    return content


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like by name; a later source wins, as tokenizer_config.json should."""
    special: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_TOKENS:
            token = source.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                special[name] = content
    return special


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, decoder: Mapping[str, Any], special: Iterable[str]
) -> None:
    """Adds the tokens that tokenizer_config.json knows and tokenizer.json does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, fields in sorted(decoder.items(), key=lambda item: int(item[0])):
        if fields["content"] in known:
            continue
        flags = {name: bool(fields.get(name, False)) for name in _ADDED_TOKEN_FLAGS}
        backend.add_tokens([tokenizers.AddedToken(fields["content"], **flags)])
        if backend.token_to_id(fields["content"]) != int(token_id):
            raise ValueError(
                f"tokenizer_config.json gives {fields['content']!r} the id {token_id}, "
                f"tokenizer.json gives it {backend.token_to_id(fields['content'])}"
            )
        known.add(fields["content"])
    backend.add_special_tokens([token for token in special if token not in known])


_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _token_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _chat_template(
    directory: pathlib.Path, settings: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    """The template from its own file, else from tokenizer_config.json: one, or a list by name."""
    sources: dict[str, str] = {}
    inline = settings.get("chat_template") or read_json(directory / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(inline, str):
        sources["default"] = inline
    elif isinstance(inline, list):
        sources.update({entry["name"]: entry["template"] for entry in inline})
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    if (directory / "chat_template.jinja").is_file():
        sources["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatTemplate(sources=sources, special_tokens=dict(special)) if sources else None
