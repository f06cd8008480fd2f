"""The fields of a config as callers give them: older names, flags, JSON values. Wrong fields raise clear errors."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

__all__ = ["ConfigFields", "Forms", "Overrides", "as_pair", "as_tuple", "resolve_config", "suggest"]

Forms = Mapping[str, Callable[[Any], Any]]
"""For each field, the function that converts a given value to the form of the dataclass."""

# For each flag, the field that it sets and the value for True and for False; None leaves the default of the class.
_FLAGS: dict[str, tuple[str, dict[bool, str | None]]] = {
    "use_pre_norm": ("norm_placement", {True: "pre", False: "post"}),
    "pre_norm": ("norm_placement", {True: "pre", False: "post"}),
    "use_rope": ("pos_emb_type", {True: "rope", False: None}),
}
_OLD_NAMES = {"max_seq_len": "max_len", "activation": "ff_activation", "layer_norm_eps": "norm_eps"}


class _Translated(type):
    """Translates the documented flags, refuses unknown fields, and converts values to the form of the dataclass."""

    def __call__(cls: Any, *values: Any, **fields: Any) -> Any:
        if values:
            raise ValueError(f"{cls.__name__}: every field must be given by its name; got {values!r} without one.")
        return super().__call__(**{name: cls.in_form(name, value) for name, value in _known(cls, fields).items()})


class ConfigFields(metaclass=_Translated):
    """A dataclass of JSON values, with the checks of its fields.

    A field may be given as JSON has it (a name, a list, a mapping). The dataclass holds an enum member, a tuple or a
    dataclass; `_forms` names the function that makes it, for each field that needs one.
    """

    _forms: ClassVar[Forms] = {}
    _choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init_subclass__(cls) -> None:
        # By name: the Literals are variables of the module. `typing.get_type_hints` takes 4 ms for all configs.
        names = vars(sys.modules[cls.__module__])
        own = {name: names.get(hint) for name, hint in inspect.get_annotations(cls).items()}
        literals = {name: get_args(hint) for name, hint in own.items() if get_origin(hint) is Literal}
        cls._choices = {**cls._choices, **literals}

    @classmethod
    def in_form(cls, name: str, value: Any) -> Any:
        """The value of a field in the form that the dataclass holds."""
        return cls._forms[name](value) if name in cls._forms else value

    @classmethod
    def from_mapping(cls, value: Any) -> Any:
        """The dataclass of a mapping of its fields; any other value as it is."""
        return cls(**value) if isinstance(value, Mapping) else value

    def _require(self, holds: bool, rule: str) -> None:
        """Raises ValueError unless `holds`, with the value of every field that `rule` names."""
        if not holds:
            fields = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
            named = [name for name in dict.fromkeys(re.findall(r"\w+", rule)) if name in fields]
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in named)
            raise ValueError(f"{type(self).__name__}: {rule}; got {values}.")

    def _require_whole(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            self._require(value is None or whole, f"{name} must be a whole number, at least {least}")

    def _require_above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            above = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < float("inf")
            self._require(value is None or above, f"{name} must be above 0")

    def _require_rate(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            within = value is None or (isinstance(value, int | float) and 0.0 <= value < 1.0)
            self._require(within, f"{name} must be at least 0 and below 1")

    def _require_choices(self) -> None:
        """Raises ValueError unless every field whose type is a Literal holds one of its values."""
        for name, options in self._choices.items():
            self._require(getattr(self, name) in options, f"{name} must be one of {', '.join(options)}")


class Overrides(dict[str, Any]):
    """The fields of a BlockConfig that one layer changes; a dict that cannot be changed, so that a config hashes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are not made item by item
        return Overrides, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("layer_pattern cannot be changed; use dataclasses.replace(config, layer_pattern=...).")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse


Config = TypeVar("Config", bound=ConfigFields)


def resolve_config(kind: type[Config], config: ConfigFields | None, fields: dict[str, Any]) -> Config:
    """The config of a module called as `Module(rngs, config)` or as `Module(rngs, **fields)`.

    Raises:
        ValueError: both or neither were given, a field does not exist, or `config` is of another kind.
    """
    if config is None:
        return kind(**fields)
    if fields:
        raise ValueError(
            f"{kind.__name__}: give a config or fields, not both; got config and {', '.join(sorted(fields))}. "
            "Use dataclasses.replace(config, ...)."
        )
    if not isinstance(config, kind):
        raise ValueError(f"{kind.__name__}: config must be a {kind.__name__}; got {type(config).__name__}.")
    return config


def as_tuple(value: Any) -> Any:
    """A list as a tuple; any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def as_pair(value: Any) -> Any:
    """A sequence as a tuple; one value as a pair of equal values."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def suggest(name: str, known: Collection[str]) -> str:
    """The field that an unknown name may have meant, or all fields, as a sentence."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" The fields are {', '.join(sorted(known))}."


def _known(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The fields given to `kind` with its flags translated; raises ValueError for unknown and missing ones."""
    fields = dict(given)
    required = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for flag, (name, meaning) in _FLAGS.items():
        if flag in fields and name in required:
            value = fields.pop(flag)
            if name in fields:
                raise ValueError(
                    f"{kind.__name__}: {flag} is another way to say {name}; got {flag}={value!r}, "
                    f"{name}={fields[name]!r}. Give one of the two."
                )
            if value not in (True, False):
                raise ValueError(f"{kind.__name__}: {flag} must be True or False; got {flag}={value!r}.")
            chosen = meaning[bool(value)]
            if chosen is not None:
                fields[name] = chosen
    for name in fields.keys() - required.keys():
        hint = f" Its name is {_OLD_NAMES[name]} today." if name in _OLD_NAMES else suggest(name, required)
        raise ValueError(f"{kind.__name__}: every argument must be a field; got {name}={fields[name]!r}.{hint}")
    missing = sorted(name for name, needed in required.items() if needed and name not in fields)
    if missing:
        raise ValueError(f"{kind.__name__}: {', '.join(missing)} must be given.")
    return fields
