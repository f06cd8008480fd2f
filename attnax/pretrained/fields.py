"""Fields of a `config.json` and their meaning here, each written once for reading and for writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnax.config import BlockConfig
from attnax.pretrained.errors import quoted

__all__ = [
    "COMMON",
    "GATED",
    "MOST",
    "PLAIN",
    "PROJECTIONS",
    "Field",
    "biases",
    "choice",
    "flag",
    "number",
    "only",
    "pad_token",
    "read_all",
    "real",
    "sides",
    "true_or_false",
    "unread",
    "whole",
    "whole_number",
    "without",
]

MOST = 1 << 24  # of a whole number: tables of positions are made before the config is compared with the files

GATED = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
"""Activations of a gated feed-forward by their names in transformers."""

PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""Activations of a feed-forward without a gate."""

PROJECTIONS = ("query", "key", "value", "out")
"""The projections of attention, as `use_bias` names them."""

_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """Keys of a config.json and fields of a config that express the same fact.

    Attributes:
        keys: of config.json.
        read: from the given values, by key, to fields of a config. A key that the file lacks is not in the mapping.
            Raises ValueError for a value that cannot be expressed.
        write: from a config to values by key.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def whole(key: str, field: str, default: Any = _REQUIRED, *, least: int = 0, null: bool = False) -> Field:
    """A whole number; with `null`, or the default None, also null, which is read as None."""

    def check(value: Any) -> bool:
        return (type(value) is int and least <= value <= MOST) or (null and value is None)

    return _same(key, field, default, check, f"a whole number of at least {least} and at most {MOST}")


def real(key: str, field: str, default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """A number; with `null`, or the default None, also null, which is read as None."""

    def check(value: Any) -> bool:
        return _is_number(value) or (null and value is None)

    return _same(key, field, default, check, "a number", lambda value: None if value is None else float(value))


def flag(key: str, field: str, default: Any = _REQUIRED) -> Field:
    """True or false."""
    return _same(key, field, default, lambda value: isinstance(value, bool), "true or false")


def choice(key: str, field: str, names: Mapping[str, Any], default: Any = _REQUIRED) -> Field:
    """One of the names; of names with the same meaning, the first is written."""
    written: dict[Any, str] = {}
    for name, value in names.items():
        written.setdefault(value, name)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        name = _get(given, key, default)
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{key} must be one of {', '.join(names)}; got {key}={quoted(name)}.")
        return {field: names[name]}

    def write(config: Any) -> dict[str, Any]:
        value = getattr(config, field)
        if value not in written:
            raise ValueError(f"{field} must be one of {', '.join(map(str, written))}; got {field}={quoted(value)}.")
        return {key: written[value]}

    return Field((key,), read, write)


def only(key: str, value: Any) -> Field:
    """An optional key with one supported value."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        got = given.get(key, value)
        if got is None and not value:
            return {}
        if type(got) is not type(value) or got != value:
            raise ValueError(f"{key} must be {value!r}, which is all that is supported; got {key}={quoted(got)}.")
        return {}

    return Field((key,), read, lambda _: {})


def unread(key: str) -> Field:
    """A key that other families read, without a meaning in this family."""
    return Field((key,), lambda _: {}, lambda _: {})


COMMON = (
    only("pruned_heads", {}),
    *(only(key, False) for key in ("is_decoder", "is_encoder_decoder", "add_cross_attention")),
    only("cross_attention_hidden_size", None),
)
"""Fields that any config.json may have."""


def biases(always: Sequence[str] = (), **flags: tuple[bool, Sequence[str]]) -> Field:
    """Which layers have a bias: the layers of `always`, and the layers of each flag, given with the flag's default."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        layers = list(always)
        for key, (default, names) in flags.items():
            layers += names if true_or_false(given.get(key, default), key) else ()
        return {"use_bias": tuple(sorted(layers)) or False}

    def write(config: BlockConfig) -> dict[str, Any]:
        return {key: all(map(config.has_bias, names)) for key, (_, names) in flags.items()}

    return Field(tuple(flags), read, write)


def sides(key: str, field: str, default: Any = _REQUIRED) -> Field:
    """Height and width: one whole number, or a pair of them."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        value = _get(given, key, default)
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(type(side) is int and 0 < side <= MOST for side in pair):
            raise ValueError(f"{key} must be a whole number of at most {MOST}, or a pair; got {key}={quoted(value)}.")
        return {field: tuple(pair)}

    def write(config: Any) -> dict[str, Any]:
        height, width = getattr(config, field)
        return {key: height if height == width else [height, width]}

    return Field((key,), read, write)


def pad_token() -> Field:
    """The id of the padding; 0 if there is none."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        token = given.get("pad_token_id")
        if token is None or token == -1:  # old files have -1 for none
            return {"pad_token_id": 0}
        if type(token) is not int or not 0 <= token < MOST:
            raise ValueError(f"pad_token_id must be a token, or null; got pad_token_id={quoted(token)}.")
        return {"pad_token_id": token}

    return Field(("pad_token_id",), read, lambda config: {"pad_token_id": config.pad_token_id})


def without(fields: Sequence[Field], *keys: str) -> tuple[Field, ...]:
    """The fields except for the fields of these keys."""
    return tuple(field for field in fields if not set(field.keys).intersection(keys))


def read_all(fields: Sequence[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that all of these fields read."""
    return {name: value for field in fields for name, value in field.read(given).items()}


def number(value: Any, key: str) -> float:
    """The value of a key, which must be a number; ValueError for any other value."""
    if not _is_number(value):
        raise ValueError(f"{key} must be a number; got {key}={quoted(value)}.")
    return float(value)


def whole_number(value: Any, key: str) -> int:
    """The value of a key, which must be a whole number above 0; ValueError for any other value."""
    if type(value) is not int or not 0 < value <= MOST:
        raise ValueError(f"{key} must be a whole number of at most {MOST}; got {key}={quoted(value)}.")
    return value


def true_or_false(value: Any, key: str) -> bool:
    """The value of a key, which must be true or false; ValueError for any other value."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; got {key}={quoted(value)}.")
    return value


def _same(
    key: str,
    field: str,
    default: Any,
    check: Callable[[Any], bool],
    rule: str,
    form: Callable[[Any], Any] = lambda value: value,
) -> Field:
    """A key and a field with the same value, which `form` converts."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        value = _get(given, key, default)
        if value is None and default is None:
            return {field: None}
        if not check(value):
            raise ValueError(f"{key} must be {rule}; got {key}={quoted(value)}.")
        return {field: form(value)}

    return Field((key,), read, lambda config: {key: getattr(config, field)})


def _get(given: Mapping[str, Any], key: str, default: Any) -> Any:
    if key not in given and default is _REQUIRED:
        raise ValueError(f"{key} is missing.")
    return given.get(key, default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300
