"""Values of a parsed config.json, refused by name where they are of a wrong type."""

from collections.abc import Mapping
from typing import Any


def object_of(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, empty where there is none."""
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {key} must be an object, got {value!r}")
    return value or {}


def int_of(raw: Mapping[str, Any], key: str, default: int | None) -> int:
    """The integer under `key`; `default` where there is none or null, which must then be one."""
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {key} must be an integer, got {value!r}")  # noqa: TRY004
    return value


def float_of(raw: Mapping[str, Any], key: str, default: float | None) -> float:
    """The number under `key`, likewise."""
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {key} must be a number, got {value!r}")  # noqa: TRY004
    return float(value)


def listed(names: Any) -> str:
    """The names for a message, each once."""
    return ", ".join(dict.fromkeys(names))
