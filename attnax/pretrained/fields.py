"""The fields of a `config.json` and what they mean here, each said once for reading and for writing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnax.config import BlockConfig, RopeScaling, StackConfig
from attnax.pretrained.errors import quoted

__all__ = [
    "COMMON",
    "FULL",
    "GATED",
    "HARMLESS",
    "MOST_LAYERS",
    "PLAIN",
    "ROPE_KEYS",
    "SLIDING",
    "Field",
    "alternate_layers",
    "biases",
    "choice",
    "flag",
    "layer_fields",
    "layers",
    "only",
    "pad_token",
    "read_layer_types",
    "read_rope",
    "real",
    "refuse_other_rope",
    "rope",
    "rope_said",
    "sides",
    "unread",
    "whole",
]

MOST = 1 << 24  # of a whole number: tables of positions are made while a model is built, before the files are compared

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
"""Activations of a plain feed-forward."""

HARMLESS = frozenset(
    {
        # who wrote the file, and what with
        *("_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        # texts rather than the model: tokens, tasks
        *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "prefix"),
        *("task_specific_params", "problem_type", "finetuning_task", "id2label", "label2id", "num_labels"),
        # how transformers writes a text, which generation_config.py reads
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "num_beams", "repetition_penalty"),
        *("max_new_tokens", "early_stopping", "length_penalty", "no_repeat_ngram_size", "num_return_sequences"),
        *("encoder_no_repeat_ngram_size", "num_beam_groups", "diversity_penalty", "typical_p", "penalty_alpha"),
        *("epsilon_cutoff", "eta_cutoff", "min_p", "min_new_tokens", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "cache_implementation", "guidance_scale"),
        *("sequence_bias", "encoder_repetition_penalty", "stop_strings", "max_time"),
        # how transformers computes, and what it returns
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16"),
        *("_attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward", "gradient_checkpointing"),
        # initial weights and training; models come without dropout
        *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "classifier_dropout"),
    }
)
"""Fields of any config.json that change nothing in what a trained model computes."""

_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """Some keys of a config.json and some fields of a config that say the same.

    Attributes:
        keys: of config.json.
        read: from those of them that are there, the fields; ValueError for what cannot be expressed.
        write: from a config, the keys.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def whole(key: str, ours: str, default: Any = _REQUIRED, *, least: int = 0, null: bool = False) -> Field:
    """A whole number; with `null`, or the default None, it may be null, which is None."""

    def check(value: Any) -> bool:
        return (type(value) is int and least <= value <= MOST) or (null and value is None)

    return _same(key, ours, default, check, f"a whole number of at least {least} and at most {MOST}")


def real(key: str, ours: str, default: Any = _REQUIRED, *, null: bool = False) -> Field:
    """A number; with `null`, or the default None, it may be null, which is None."""

    def check(value: Any) -> bool:
        return _is_number(value) or (null and value is None)

    return _same(key, ours, default, check, "a number", lambda value: None if value is None else float(value))


def flag(key: str, ours: str, default: Any = _REQUIRED) -> Field:
    """True or false."""
    return _same(key, ours, default, lambda value: isinstance(value, bool), "true or false")


def choice(key: str, ours: str, names: Mapping[str, Any], default: Any = _REQUIRED) -> Field:
    """One of their names; of two with one meaning the first is written."""
    written: dict[Any, str] = {}
    for name, value in names.items():
        written.setdefault(value, name)

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        name = _get(theirs, key, default)
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{key} must be one of {', '.join(names)}; got {key}={quoted(name)}.")
        return {ours: names[name]}

    def write(config: Any) -> dict[str, Any]:
        value = getattr(config, ours)
        if value not in written:
            raise ValueError(f"{ours} must be one of {', '.join(map(str, written))}; got {ours}={quoted(value)}.")
        return {key: written[value]}

    return Field((key,), read, write)


def only(key: str, value: Any) -> Field:
    """A key that may be left out, and has one value that is understood."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        got = theirs.get(key, value)
        if got is None and not value:
            return {}
        if type(got) is not type(value) or got != value:
            raise ValueError(f"{key} must be {value!r}, which is all that is supported; got {key}={quoted(got)}.")
        return {}

    return Field((key,), read, lambda _: {})


def unread(key: str) -> Field:
    """A key that other families read, and that says nothing in this one."""
    return Field((key,), lambda _: {}, lambda _: {})


COMMON = (
    only("pruned_heads", {}),
    only("is_decoder", False),
    only("is_encoder_decoder", False),
    only("add_cross_attention", False),
    only("cross_attention_hidden_size", None),
)
"""Fields that any config.json may have."""


def biases(always: Sequence[str] = (), **flags: tuple[bool, Sequence[str]]) -> Field:
    """Which layers have a bias: those of `always`, and those of each flag, given with its default."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        layers = list(always)
        for key, (default, names) in flags.items():
            layers += names if _true_or_false(theirs.get(key, default), key) else ()
        return {"use_bias": tuple(sorted(layers)) or False}

    def write(config: BlockConfig) -> dict[str, Any]:
        return {key: all(map(config.has_bias, names)) for key, (_, names) in flags.items()}

    return Field(tuple(flags), read, write)


def sides(key: str, ours: str, default: Any = _REQUIRED) -> Field:
    """Height and width: one whole number, or a pair of them."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        value = _get(theirs, key, default)
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(type(side) is int and 0 < side <= MOST for side in pair):
            raise ValueError(f"{key} must be a whole number of at most {MOST}, or a pair; got {key}={quoted(value)}.")
        return {ours: tuple(pair)}

    def write(config: Any) -> dict[str, Any]:
        height, width = getattr(config, ours)
        return {key: height if height == width else [height, width]}

    return Field((key,), read, write)


def pad_token() -> Field:
    """The id of the padding; 0 where there is none."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        token = theirs.get("pad_token_id")
        if token is None or token == -1:  # as old files say that there is none
            return {"pad_token_id": 0}
        if type(token) is not int or not 0 <= token < MOST:
            raise ValueError(f"pad_token_id must be a token, or null; got pad_token_id={quoted(token)}.")
        return {"pad_token_id": token}

    return Field(("pad_token_id",), read, lambda config: {"pad_token_id": config.pad_token_id})


def layers(default: LayerTypes, window: int | None, *, switch: str | None = None) -> Field:
    """Which layers see a window only: `layer_types`, one name a layer, and `sliding_window`.

    Args:
        default: the types where none are said, from the other keys and the number of layers.
        window: the sliding_window where none is said.
        switch: a key that must be true for any window, by default false.
    """
    size = whole("sliding_window", "size", window, null=True)

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        on = switch is None or _true_or_false(theirs.get(switch, False), switch)
        types = read_layer_types(theirs, default)
        width = size.read(theirs)["size"] if on else None
        if SLIDING in types and width is None:
            raise ValueError(f"sliding_window must be a whole number where layer_types has {SLIDING}; got None.")
        return layer_fields([{"attention_window": width} if kind == SLIDING else {} for kind in types])

    def write(config: StackConfig) -> dict[str, Any]:
        windows = [config.layer(index).attention_window for index in range(config.num_layers)]
        types = [FULL if size is None else SLIDING for size in windows]
        said = {"layer_types": types, "sliding_window": next((size for size in windows if size is not None), window)}
        return said if switch is None else said | {switch: SLIDING in types}

    keys = ("layer_types", "sliding_window", "num_hidden_layers", "max_window_layers")
    return Field(keys if switch is None else (*keys, switch), read, write)


FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = Callable[[Mapping[str, Any], int], Sequence[str]]
MOST_LAYERS = 1024


def read_layer_types(theirs: Mapping[str, Any], default: LayerTypes) -> Sequence[str]:
    """One of `FULL` and `SLIDING` a layer."""
    count = _whole_number(theirs.get("num_hidden_layers"), "num_hidden_layers")
    if count > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}; got num_hidden_layers={count}.")
    types = theirs.get("layer_types")
    if types is None:
        return default(theirs, count)
    if not isinstance(types, list) or len(types) != count or any(kind not in (FULL, SLIDING) for kind in types):
        raise ValueError(f"layer_types must be {count} times {FULL} or {SLIDING}; got {quoted(types)}.")
    return types


def alternate_layers(_: Mapping[str, Any], count: int) -> list[str]:
    """A window in every other layer, from the first on."""
    return [FULL if layer % 2 else SLIDING for layer in range(count)]


def layer_fields(overrides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of a config whose layers have these, one mapping a layer; a `layer_pattern` where they differ."""
    if all(fields == overrides[0] for fields in overrides):
        return dict(overrides[0])
    periods = range(2, len(overrides) + 1)
    period = next(count for count in periods if list(overrides[count:]) == list(overrides[:-count]))
    return {"layer_pattern": tuple(overrides[:period])}


def rope(
    theta: float = 10000.0,
    *,
    base: str = "rope_theta",
    fraction: tuple[str, float] | None = None,
    scaling: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = ("default", "linear", "llama3", "yarn"),
) -> Field:
    """Rotary positions: `rope_parameters` as transformers 5 writes it, or base, fraction and `rope_scaling` as 4 did.

    Args:
        theta: the base where none is given.
        base: its key.
        fraction: the key of the part of each head that is rotated, and its default; None rotates all of it.
        scaling: the rope_scaling where none is given.
        kinds: of scaling that the family has.
    """
    keys = (base, *ROPE_KEYS, *(() if fraction is None else fraction[:1]))

    def read_said(said: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        said, ours = dict(said), {}
        if fraction is not None:
            key, default = fraction
            ours["rope_fraction"] = _number(said.pop("partial_rotary_factor", theirs.get(key, default)), key)
        if theirs.get("original_max_position_embeddings") is not None:  # comes first, as in transformers
            said["original_max_position_embeddings"] = theirs["original_max_position_embeddings"]
        return ours | read_rope(said, theirs.get(base, theta), theirs.get("max_position_embeddings"))

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        parameters, older = (rope_said(theirs, key) for key in ("rope_parameters", "rope_scaling"))
        ours = read_said(older or parameters or scaling or {}, theirs)
        if parameters and older:
            refuse_other_rope(ours, read_said(parameters, theirs))
        kind = "default" if ours["rope_scaling"] is None else ours["rope_scaling"].kind
        if kind not in kinds:
            raise ValueError(f"rope_type must be one of {', '.join(kinds)}; got rope_type={quoted(kind)}.")
        return ours

    def write(config: BlockConfig) -> dict[str, Any]:
        none = None if scaling is None else {"rope_type": "default"}
        theirs = {base: config.rope_base, "rope_scaling": write_rope_scaling(config.rope_scaling) or none}
        return theirs if fraction is None else theirs | {fraction[0]: config.rope_fraction}

    return Field(keys, read, write)


ROPE_KEYS = ("rope_parameters", "rope_scaling", "original_max_position_embeddings", "max_position_embeddings")
"""Keys of every config.json with rotary positions."""


def rope_said(theirs: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object by the name of `rope_parameters`, or of `rope_scaling` as older files call it; empty for null.

    Raises:
        ValueError: it is no object.
    """
    value = theirs.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object or null; got {key}={quoted(value)}.")
    return value or {}


def refuse_other_rope(older: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raises ValueError where `rope_scaling`, which transformers takes, says other than `rope_parameters`."""
    if older != parameters:
        raise ValueError(
            "rope_parameters and rope_scaling are two names of one thing, and must say the same where both are there; "
            f"got {_shown(parameters)} and {_shown(older)}. Leave one out; transformers takes rope_scaling."
        )


def _shown(rope: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in rope.items())


_SCALINGS = {  # kind: (fields, their keys), beside rope_type and factor
    "default": {},
    "linear": {},
    "llama3": {
        "original_max_position_embeddings": "original_max_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "original_max_position_embeddings": "original_max_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}


def read_rope(said: Mapping[str, Any], theta: Any, max_len: Any) -> dict[str, Any]:
    """Base and scaling of a `rope_parameters`; theta and max_len are what holds where it says nothing."""
    said = dict(said)
    base = _number(said.pop("rope_theta", theta), "rope_theta")
    return {"rope_base": base, "rope_scaling": read_rope_scaling(said, max_len)}


_INERT = {
    *(key for names in _SCALINGS.values() for key in names),
    *("factor", "mscale", "mscale_all_dim", "short_factor", "long_factor", "mrope_section", "finetuned"),
}
"""Keys that may be there where the kind has no use for them, as transformers has it."""


def read_rope_scaling(said: Mapping[str, Any], max_len: Any) -> RopeScaling | None:
    """The scaling that a `rope_scaling` describes.

    Args:
        said: it, without base and fraction.
        max_len: the model's, which is also the length trained at where none is said.

    Raises:
        ValueError: a kind or a key that is not supported, or a value that makes no sense.
    """
    given = {key: value for key, value in said.items() if value is not None}
    if "truncate" in said and said["truncate"] is None:  # which transformers takes as false
        given["truncate"] = False
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"rope_type must be one of {', '.join(_SCALINGS)}; got rope_type={quoted(kind)}.")
    unknown = sorted(key for key in given if key not in _INERT and (key, given[key]) != ("partial_rotary_factor", 1.0))
    if unknown:
        raise ValueError(f"rope_type={kind!r} must have no {quoted(unknown)}.")
    if kind == "default":
        return None
    names = _SCALINGS[kind]
    missing = [key for key in ("low_freq_factor", "high_freq_factor") if key in names and key not in given]
    if missing:
        raise ValueError(f"rope_type={kind!r} must have {' and '.join(missing)}.")
    if "original_max_position_embeddings" in names:
        given.setdefault("original_max_position_embeddings", max_len)
    fields: dict[str, Any] = {"kind": kind}
    fields |= {name: _SCALING_FORMS.get(name, _number)(given[key], key) for key, name in names.items() if key in given}
    if kind == "yarn" and "factor" in said and said["factor"] is None:
        given["factor"] = _whole_number(max_len, "max_position_embeddings") / fields["original_max_len"]
    factor = _number(given.get("factor"), "factor")
    if factor < 1.0:
        raise ValueError(f"factor must be at least 1; got factor={factor}.")
    mscale, all_dim = (_number(given.get(key, 0), key) for key in ("mscale", "mscale_all_dim"))
    if kind == "yarn" and mscale and all_dim:
        # In models after DeepSeek-V2 these say the attention_factor.
        over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in (mscale, all_dim))
        if over <= 0.0 or under <= 0.0:
            raise ValueError(f"mscale and mscale_all_dim must be above 0; got {mscale} and {all_dim}.")
        fields.setdefault("attention_factor", over / under)
    return RopeScaling(factor=factor, **fields)


def write_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json."""
    if scaling is None:
        return None
    if scaling.kind not in _SCALINGS:
        raise ValueError(f"rope_scaling must be one of {', '.join(_SCALINGS)}; got kind={scaling.kind!r}.")
    values = {key: getattr(scaling, name) for key, name in _SCALINGS[scaling.kind].items()}
    written = {"rope_type": scaling.kind, "factor": scaling.factor, **values}
    return {key: value for key, value in written.items() if value is not None}


def _same(
    key: str, ours: str, default: Any, check: Callable[[Any], bool], rule: str, form: Callable[[Any], Any] = lambda x: x
) -> Field:
    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        value = _get(theirs, key, default)
        if value is None and default is None:
            return {ours: None}
        if not check(value):
            raise ValueError(f"{key} must be {rule}; got {key}={quoted(value)}.")
        return {ours: form(value)}

    return Field((key,), read, lambda config: {key: getattr(config, ours)})


def _get(theirs: Mapping[str, Any], key: str, default: Any) -> Any:
    if key not in theirs and default is _REQUIRED:
        raise ValueError(f"{key} is missing.")
    return theirs.get(key, default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _number(value: Any, key: str) -> float:
    if not _is_number(value):
        raise ValueError(f"{key} must be a number; got {key}={quoted(value)}.")
    return float(value)


def _whole_number(value: Any, key: str) -> int:
    if type(value) is not int or not 0 < value <= MOST:
        raise ValueError(f"{key} must be a whole number of at most {MOST}; got {key}={quoted(value)}.")
    return value


def _true_or_false(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; got {key}={quoted(value)}.")
    return value


_SCALING_FORMS: dict[str, Callable[[Any, str], Any]] = {"original_max_len": _whole_number, "truncate": _true_or_false}
