"""The rotary positions of a `config.json`: its base, its scaling, and the fraction of each head that is rotated.

Version 5 of transformers writes one object, `rope_parameters`. Version 4 wrote the base, the fraction and an object
`rope_scaling` apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnax.config import BlockConfig, RopeScaling
from attnax.pretrained.errors import quoted
from attnax.pretrained.fields import Field, number, true_or_false, whole_number

__all__ = ["ROPE_KEYS", "read_rope", "refuse_other_rope", "rope", "rope_object", "write_rope_scaling"]

ROPE_KEYS = ("rope_parameters", "rope_scaling", "original_max_position_embeddings", "max_position_embeddings")
"""Keys of every config.json with rotary positions."""

_LENGTH = {"original_max_position_embeddings": "original_max_len"}
_SCALINGS: dict[str, dict[str, str]] = {  # kind: the fields of RopeScaling by their keys, beside rope_type and factor
    "default": {},
    "linear": {},
    "llama3": _LENGTH | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "yarn": _LENGTH | {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")},
}
_FORMS: dict[str, Callable[[Any, str], Any]] = {"original_max_len": whole_number, "truncate": true_or_false}
_KNOWN = {  # keys that any kind may have, even without a use for them, as in transformers
    *(key for names in _SCALINGS.values() for key in names),
    *("factor", "mscale", "mscale_all_dim", "short_factor", "long_factor", "mrope_section", "finetuned"),
}


def rope(
    theta: float = 10000.0,
    *,
    base: str = "rope_theta",
    fraction: tuple[str, float] | None = None,
    scaling: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = ("default", "linear", "llama3", "yarn"),
) -> Field:
    """Rotary positions that are the same in all layers.

    Args:
        theta: the base in a file without one.
        base: the key of the base.
        fraction: the key of the fraction of each head that is rotated, and its default; None rotates all of it.
        scaling: the scaling in a file without one.
        kinds: of scaling that the family has.
    """
    keys = (base, *ROPE_KEYS, *(() if fraction is None else fraction[:1]))

    def read_object(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        found, fields = dict(found), {}
        if fraction is not None:
            key, default = fraction
            fields["rope_fraction"] = number(found.pop("partial_rotary_factor", given.get(key, default)), key)
        if given.get("original_max_position_embeddings") is not None:  # takes precedence, as in transformers
            found["original_max_position_embeddings"] = given["original_max_position_embeddings"]
        return fields | read_rope(found, given.get(base, theta), given.get("max_position_embeddings"))

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        parameters, older = (rope_object(given, key) for key in ("rope_parameters", "rope_scaling"))
        fields = read_object(older or parameters or scaling or {}, given)
        if parameters and older:
            refuse_other_rope(fields, read_object(parameters, given))
        kind = "default" if fields["rope_scaling"] is None else fields["rope_scaling"].kind
        if kind not in kinds:
            raise ValueError(f"rope_type must be one of {', '.join(kinds)}; got rope_type={quoted(kind)}.")
        return fields

    def write(config: BlockConfig) -> dict[str, Any]:
        none = None if scaling is None else {"rope_type": "default"}
        written = {base: config.rope_base, "rope_scaling": write_rope_scaling(config.rope_scaling) or none}
        return written if fraction is None else written | {fraction[0]: config.rope_fraction}

    return Field(keys, read, write)


def rope_object(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `rope_parameters` or `rope_scaling`; empty if it is null or missing.

    Raises:
        ValueError: the value is something else.
    """
    value = given.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object or null; got {key}={quoted(value)}.")
    return value or {}


def refuse_other_rope(older: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raises ValueError if `rope_scaling`, which transformers uses, differs from `rope_parameters`."""
    if older != parameters:
        raise ValueError(
            "rope_parameters and rope_scaling are two names of one thing, and must be equal if both are present; "
            f"got {_shown(parameters)} and {_shown(older)}. Leave one out; transformers takes rope_scaling."
        )


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def read_rope(found: Mapping[str, Any], theta: Any, max_len: Any) -> dict[str, Any]:
    """Base and scaling of an object of rotary positions.

    Args:
        found: the object.
        theta: the base if the object has none.
        max_len: of the model, for a scaling that does not give the length of its training.

    Raises:
        ValueError: a kind or a key that is not supported, or a value out of range.
    """
    found = dict(found)
    base = number(found.pop("rope_theta", theta), "rope_theta")
    return {"rope_base": base, "rope_scaling": _read_scaling(found, max_len)}


def _read_scaling(found: Mapping[str, Any], max_len: Any) -> RopeScaling | None:
    """The scaling of an object without base and fraction."""
    given = {key: value for key, value in found.items() if value is not None}
    if "truncate" in found and found["truncate"] is None:  # transformers takes null for false
        given["truncate"] = False
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    _check_kind(kind, given)
    if kind == "default":
        return None
    names = _SCALINGS[kind]
    if "original_max_position_embeddings" in names:
        given.setdefault("original_max_position_embeddings", max_len)
    fields: dict[str, Any] = {"kind": kind}
    fields |= {name: _FORMS.get(name, number)(given[key], key) for key, name in names.items() if key in given}
    if kind == "yarn" and "factor" in found and found["factor"] is None:
        given["factor"] = whole_number(max_len, "max_position_embeddings") / fields["original_max_len"]
    factor = number(given.get("factor"), "factor")
    if factor < 1.0:
        raise ValueError(f"factor must be at least 1; got factor={factor}.")
    mscale, all_dim = (number(given.get(key, 0), key) for key in ("mscale", "mscale_all_dim"))
    if kind == "yarn" and mscale and all_dim:
        fields.setdefault("attention_factor", _attention_factor(factor, mscale, all_dim))
    return RopeScaling(factor=factor, **fields)


def _check_kind(kind: Any, given: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown kind, a key that no kind has, or a missing key without a default."""
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"rope_type must be one of {', '.join(_SCALINGS)}; got rope_type={quoted(kind)}.")
    unknown = sorted(key for key in given if key not in _KNOWN and (key, given[key]) != ("partial_rotary_factor", 1.0))
    if unknown:
        raise ValueError(f"rope_type={kind!r} must have no {quoted(unknown)}.")
    missing = [key for key in ("low_freq_factor", "high_freq_factor") if key in _SCALINGS[kind] and key not in given]
    if missing:
        raise ValueError(f"rope_type={kind!r} must have {' and '.join(missing)}.")


def _attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """YaRN's attention_factor of models since DeepSeek-V2; raises ValueError if it would not be above 0."""
    over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in (mscale, mscale_all_dim))
    if over <= 0.0 or under <= 0.0:
        raise ValueError(f"mscale and mscale_all_dim must be above 0; got {mscale} and {mscale_all_dim}.")
    return over / under


def write_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json.

    Raises:
        ValueError: a kind that transformers does not have.
    """
    if scaling is None:
        return None
    if scaling.kind not in _SCALINGS:
        raise ValueError(f"rope_scaling must be one of {', '.join(_SCALINGS)}; got kind={scaling.kind!r}.")
    values = {key: getattr(scaling, name) for key, name in _SCALINGS[scaling.kind].items()}
    written = {"rope_type": scaling.kind, "factor": scaling.factor, **values}
    return {key: value for key, value in written.items() if value is not None}
