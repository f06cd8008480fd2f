"""The `generation_config.json` of a checkpoint, read into `GenerationSettings`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.generation_settings import NAME, GenerationSettings
from attnax.pretrained.hub import find_folder
from attnax.pretrained.json_object import read_object

__all__ = ["GenerationSettings", "load_generation_config", "read_generation_config"]


def load_generation_config(folder: str | Path) -> GenerationSettings:
    """The settings with which the authors of a checkpoint generate text.

    The settings are in the folder's `generation_config.json` or, without this file, in its `config.json`, as in
    transformers. Special tokens that `generation_config.json` lacks also come from `config.json`. One warning names the
    settings that would change the text and are not supported.

    Args:
        folder: as in `load_pretrained`.

    Raises:
        CheckpointError: a file is missing or damaged, or holds values out of range; all of them are named.

    Example:
        >>> import json, pathlib, tempfile
        >>> from attnax.pretrained import load_generation_config
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text("{}")
        >>> _ = (folder / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 2}')
        >>> settings = load_generation_config(folder)
        >>> settings.num_beams, settings.eos_token_id, settings.do_sample
        (4, (2,), False)
    """
    folder = find_folder(folder)
    settings = read_generation_config(folder, read_object(folder / "config.json"))
    complaint = settings.complaint()
    if complaint is not None:
        warnings.warn(complaint, stacklevel=2)
    return settings


def read_generation_config(folder: Path, config_json: Mapping[str, Any]) -> GenerationSettings:
    """`load_generation_config` without the warning, for a folder whose config.json is read already."""
    config, path = folder / "config.json", folder / NAME
    if not path.exists():
        known = _READERS.keys() | _UNSUPPORTED.keys()
        given = {key: value for key, value in config_json.items() if key in known}
        return _settings(config, given, GenerationSettings())
    tokens = _settings(config, {key: config_json.get(key) for key in _TOKENS}, GenerationSettings())
    return _settings(path, read_object(path), tokens)


def _settings(path: Path, given: Mapping[str, Any], defaults: GenerationSettings) -> GenerationSettings:
    """The settings of a file; settings that the file lacks come from `defaults`."""
    said, unsupported = _read_values(path, given)
    biases = said.pop("sequence_bias", ())
    if any(len(tokens) > 1 for tokens, _ in biases):
        unsupported["sequence_bias"] = given["sequence_bias"]
    elif biases:
        said["sequence_bias"] = tuple((tokens[0], bias) for tokens, bias in biases)
    settings = dataclasses.replace(defaults, **said, said=defaults.said | frozenset(said))
    if settings.num_beams > 1:
        if settings.do_sample:  # our beam search draws nothing
            unsupported["do_sample"] = True
        if settings.num_return_sequences > settings.num_beams:
            raise CheckpointError(
                path,
                f"num_return_sequences must be at most num_beams={settings.num_beams}; "
                f"got num_return_sequences={settings.num_return_sequences}.",
            )
    else:
        if not settings.do_sample and settings.num_return_sequences > 1:
            unsupported["num_return_sequences"] = settings.num_return_sequences
        unsupported.pop("renormalize_logits", None)  # changes neither a draw nor the likeliest token
    if not settings.do_sample:
        unsupported = {key: value for key, value in unsupported.items() if key not in _UNSUPPORTED_OF_A_DRAW}
    return dataclasses.replace(settings, unsupported=unsupported)


def _read_values(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a file, and the keys in it that would change the text and are not supported.

    Raises:
        CheckpointError: values out of range, all of them.
    """
    said: dict[str, Any] = {}
    unsupported: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        if value is None or key in _INERT or key.startswith("_"):
            continue
        if key not in _READERS:
            if key not in _UNSUPPORTED or value not in _UNSUPPORTED[key]:
                unsupported[key] = value
            continue
        rule, read = _READERS[key]
        try:
            said[key] = read(value)
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{key} must be {rule}; got {key}={quoted(value)}.")
    if problems:
        raise CheckpointError(path, problems)
    return said, unsupported


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError


def _flag(value: Any) -> bool:
    _check(isinstance(value, bool))
    return bool(value)


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        _check(type(value) is int and least <= value < 2**31)
        return int(value)

    return read


def _real(holds: Callable[[float], bool]) -> Callable[[Any], float]:
    """A number that keeps the rule after rounding to float32, the dtype in which it is used."""

    def read(value: Any) -> float:
        _check(type(value) in (int, float))
        with np.errstate(over="ignore"):
            known = float(np.float32(value))
        _check(math.isfinite(known) and holds(known))
        return float(value)

    return read


_token = _whole(0)


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _tokens(value: Any) -> tuple[int, ...]:
    return tuple(map(_token, _listed(value)))


def _one_token(value: Any) -> int | None:
    tokens = _tokens(value)
    _check(len(tokens) <= 1)
    return tokens[0] if tokens else None


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    _check(isinstance(value, list) and all(isinstance(word, list) and word for word in value))
    return tuple(map(_tokens, value))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    _check(isinstance(value, list))
    number = _real(math.isfinite)
    return tuple((tokens, number(bias)) for word, bias in value for (tokens,) in [_words([word])])


def _texts(value: Any) -> tuple[str, ...]:
    texts = _listed(value)
    _check(all(isinstance(text, str) and text for text in texts))
    for text in texts:
        text.encode()  # refuses half a surrogate pair
    return texts


def _early_stopping(value: Any) -> Any:
    _check(isinstance(value, bool) or value == "never")
    return value


_FROM_0, _FROM_1 = ((f"a whole number, at least {least} and below 2 ** 31", _whole(least)) for least in (0, 1))
_FRACTION = "at least 0 and at most 1", _real(lambda x: 0 <= x <= 1)
_ONE, _LIST = ("one token", _one_token), ("a token or a list of them", _tokens)
_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "do_sample": ("true or false", _flag),
    "temperature": ("at least 0 and finite", _real(lambda x: x >= 0)),
    "top_k": _FROM_0,
    "top_p": _FRACTION,
    "min_p": _FRACTION,
    "repetition_penalty": ("above 0 and finite", _real(lambda x: x > 0)),
    "no_repeat_ngram_size": _FROM_0,
    "sequence_bias": ("a list of pairs, [tokens, number]", _biases),
    "bad_words_ids": ("a list of lists of tokens", _words),
    "min_length": _FROM_0,
    "min_new_tokens": _FROM_0,
    "forced_bos_token_id": _ONE,
    "forced_eos_token_id": _LIST,
    "suppress_tokens": _LIST,
    "begin_suppress_tokens": _LIST,
    "num_beams": _FROM_1,
    "length_penalty": ("a finite number", _real(math.isfinite)),
    "early_stopping": ('true, false or "never"', _early_stopping),
    "num_return_sequences": _FROM_1,
    "max_length": _FROM_1,
    "max_new_tokens": _FROM_1,
    "stop_strings": ("a string or a list of them, none of them empty", _texts),
    "eos_token_id": _LIST,
    "bos_token_id": _ONE,
    "decoder_start_token_id": _ONE,
}
"""For each setting a rule in words, and the function that reads a value or raises if it breaks the rule."""

_TOKENS = ("eos_token_id", "bos_token_id", "decoder_start_token_id")

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("constraints", "dola_layers", "exponential_decay_length_penalty", "force_words_ids"), ()),
    **dict.fromkeys(("max_time", "top_h", "watermarking_config"), ()),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0.0,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "typical_p"), (1.0,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "renormalize_logits", "token_healing"), (False,)),
}
"""Settings that change texts and are not supported, with the values that change nothing; 0 and False are equal."""

_UNSUPPORTED_OF_A_DRAW = frozenset(("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p"))

_INERT = frozenset(
    (
        # the origin of the file, and the form of the results of transformers
        *("transformers_version", "pad_token_id", "return_dict_in_generate", "return_legacy_cache"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        # how transformers computes the same text: caches, drafts
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "remove_invalid_values"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
    )
)
