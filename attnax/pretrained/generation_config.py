"""`generation_config.json`: how the authors of a checkpoint let it write, in the words of transformers."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attnax.errors import InputError
from attnax.generation import Sampler, TokenRules
from attnax.generation.beam import EarlyStopping
from attnax.models.seq2seq import Transformer
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.hub import find_folder
from attnax.pretrained.json_object import read_object
from attnax.typing import ArrayLike

__all__ = ["GenerationSettings", "load_generation_config", "read_generation_config"]

NAME = "generation_config.json"
_NEW_TOKENS = 20  # that transformers writes unless something says how many
_EARLY_STOPPING: dict[Any, EarlyStopping] = {False: "heuristic", True: "first", "never": "never"}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a checkpoint is to write: what its `generation_config.json` says, in names and with defaults of transformers.

    `dataclasses.replace` changes a setting.

    Attributes:
        do_sample: whether tokens are drawn; if not, `temperature`, `top_k`, `top_p` and `min_p` mean nothing.
        temperature: of the drawing.
        top_k: of the drawing; 0 keeps all.
        top_p: of the drawing.
        min_p: of the drawing.
        repetition_penalty: as in a `Sampler`.
        no_repeat_ngram_size: `no_repeat_ngram` of a `Sampler`, or 0.
        sequence_bias: pairs of a token and what is added to its logit.
        bad_words_ids: sequences of tokens that are not written.
        min_length: tokens before which no text ends, the prompt's or the start token included.
        min_new_tokens: tokens to write before a text may end, in place of `min_length`.
        forced_bos_token_id: the token that follows a prompt of one token, or the start token.
        forced_eos_token_id: tokens one of which ends a text that reaches its greatest length.
        suppress_tokens: tokens that are not written.
        begin_suppress_tokens: tokens that are not written first.
        num_beams: of a beam search; 1 is none.
        length_penalty: of a beam search.
        early_stopping: of a beam search.
        num_return_sequences: texts for each prompt.
        max_length: tokens at most, the prompt's or the start token included.
        max_new_tokens: tokens to write at most, in place of `max_length`.
        stop_strings: strings that end a text, which `attnax generate` obeys.
        eos_token_id: tokens that end a text.
        bos_token_id: the token that a text starts with.
        decoder_start_token_id: the token that a text of an encoder-decoder starts with, in place of `bos_token_id`.
        said: which of these a file says.
        unsupported: what it says more and is not obeyed.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[int, float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    said: frozenset[str] = frozenset()
    unsupported: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def start_token(self) -> int | None:
        """The token that a text of an encoder-decoder starts with."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id

    @property
    def says_how(self) -> bool:
        """Whether a file says how tokens are chosen: drawn, searched for, or the likeliest."""
        return not self.said.isdisjoint(("do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams"))

    def arguments(self, model: Any, prompt_ids: ArrayLike) -> dict[str, Any]:
        """The keywords with which a model writes what transformers' `generate` writes with such a file.

        They are those of the model's `generate`, or with `num_beams` above 1 of its `beam_search`, whose first
        `num_return_sequences` texts are meant. Where tokens are drawn, `generate` takes a key of yours beside them.

        Args:
            model: a TransformerLM, or a Transformer.
            prompt_ids: (batch, T) of a TransformerLM, whose number counts in `max_length` and `min_length`; those that
                a Transformer reads do not.

        Raises:
            InputError: a prompt of `max_length` tokens, tokens that the model lacks and must write, or no start token.
        """
        named: dict[str, Any] = {}
        if isinstance(model, Transformer):
            config, length = model.decoder.config, 1
            if self.start_token is None:
                raise InputError("arguments: an encoder-decoder needs a decoder_start_token_id; got None. Give one.")
            room = self.room(length) or _NEW_TOKENS
            named = {"max_length": room, "start_token": self.start_token}
        else:
            config, length = model.config, np.shape(prompt_ids)[1]
            room = self.room(length) or min(_NEW_TOKENS, max(1, config.max_len - length))
            named = {"max_new_tokens": room}
        if self.stop_strings:
            warnings.warn(
                f"stop_strings={quoted(list(self.stop_strings))} end nothing without a tokenizer. "
                "Give stop_sequences of tokens.",
                stacklevel=2,
            )
        is_search = self.num_beams > 1
        sampler = Sampler(
            **({} if is_search else self.drawing()),
            **self.penalties(),
            **self.constraints(config.vocab_size, length, room),
        )
        named |= {"sampler": sampler, "end_token": [token for token in self.eos_token_id if token < config.vocab_size]}
        if is_search:
            return named | {"num_beams": self.num_beams} | self.search()
        return named | ({"num_samples": self.num_return_sequences} if self.do_sample else {})

    def room(self, length: int) -> int | None:
        """Tokens to write at most after a prompt of `length`, None where nothing says it.

        Raises:
            InputError: there is room for none.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= length:
            raise InputError(
                f"max_length={self.max_length} of the checkpoint leaves no room after the prompt's {length} tokens, "
                "which it counts. Say how many new tokens to write."
            )
        return self.max_length - length

    def drawing(self) -> dict[str, Any]:
        """The fields of a `Sampler` that say how tokens are drawn."""
        if not self.do_sample or self.top_p == 0.0:  # of which one token is left
            return {"temperature": 0.0}
        fields = {"temperature": self.temperature, "top_k": self.top_k or None, "min_p": self.min_p}
        return fields | {"top_p": None if self.top_p == 1.0 else self.top_p}

    def penalties(self) -> dict[str, Any]:
        """The fields of a `Sampler` that keep a text from repeating itself."""
        penalty = None if self.repetition_penalty == 1.0 else self.repetition_penalty
        return {"repetition_penalty": penalty, "no_repeat_ngram": self.no_repeat_ngram_size or None}

    def search(self) -> dict[str, Any]:
        """What a beam search takes beside the number of beams."""
        return {"length_penalty": self.length_penalty, "early_stopping": _EARLY_STOPPING[self.early_stopping]}

    def constraints(self, vocab_size: int, length: int, max_new_tokens: int) -> dict[str, Any]:
        """The fields of a `Sampler` that forbid and force tokens, of prompts of `length`.

        Raises:
            InputError: tokens that must follow are not among the `vocab_size`.
        """
        first = self.forced_bos_token_id if length == 1 else None
        for key in ("forced_bos_token_id", "forced_eos_token_id"):
            if any(token >= vocab_size for token in _listed(getattr(self, key))):
                raise InputError(f"{key} must be below vocab_size={vocab_size}; got {key}={getattr(self, key)}.")
        ends = self.eos_token_id
        words = [word for word in self.bad_words_ids if not (len(word) == 1 and word[0] in ends)]
        least = max(0, self.min_length - length) if self.min_new_tokens is None else self.min_new_tokens
        rules: dict[str, Any] = {}
        if words:
            longest = max(map(len, words))
            rules["bad_words"] = np.asarray([[-1] * (longest - len(word)) + list(word) for word in words], np.int32)
        if ends and least:
            rules |= {"end_tokens": _array(ends), "min_new_tokens": np.int32(least)}
        if first is not None:
            rules["forced_first"] = np.int32(first)
        if self.forced_eos_token_id:
            rules |= {"forced_last": _array(self.forced_eos_token_id), "max_new_tokens": np.int32(max_new_tokens)}
        if self.suppress_tokens:
            rules["suppress_tokens"] = _array(self.suppress_tokens)
        if self.begin_suppress_tokens:
            rules |= {
                "begin_suppress_tokens": _array(self.begin_suppress_tokens),
                "begin_index": np.int32(first is not None),
            }
        bias = {token: value for token, value in self.sequence_bias if token < vocab_size}
        return {"logit_bias": bias or None, "logits_fn": TokenRules(**rules) if rules else None}

    def complaint(self, obeyed: Collection[str] = ()) -> str | None:
        """What the file says and is not obeyed, in one sentence, or None.

        Args:
            obeyed: keys that the caller follows after all.
        """
        left = {key: value for key, value in self.unsupported.items() if key not in obeyed}
        if not left:
            return None
        named = ", ".join(f"{key}={quoted(value)}" for key, value in left.items())
        return f"{NAME}: not supported, and left out: {named}."


def load_generation_config(folder: str | Path) -> GenerationSettings:
    """How the authors of a checkpoint let it write.

    That is what the folder's `generation_config.json` says, or where it has none, as in transformers, what its
    `config.json` says of it. Tokens that the former does not name are those of the latter. What would change the text
    and is not supported is named in one warning.

    Args:
        folder: as in `load_pretrained`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or holds a value out of range; all of them at once.

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
    settings = read_generation_config(find_folder(folder))
    complaint = settings.complaint()
    if complaint is not None:
        warnings.warn(complaint, stacklevel=2)
    return settings


def read_generation_config(folder: Path) -> GenerationSettings:
    """`load_generation_config` of a folder, without the warning."""
    config, path = folder / "config.json", folder / NAME
    theirs = read_object(config)
    if not path.exists():
        known = _READERS.keys() | _UNSUPPORTED.keys()
        return _settings(config, {key: value for key, value in theirs.items() if key in known}, GenerationSettings())
    tokens = _settings(config, {key: theirs.get(key) for key in _TOKENS}, GenerationSettings())
    return _settings(path, read_object(path), tokens)


def _settings(path: Path, theirs: Mapping[str, Any], beside: GenerationSettings) -> GenerationSettings:
    """What a file says, and of what it does not, `beside`."""
    said: dict[str, Any] = {}
    unsupported: dict[str, Any] = {}
    problems = []
    for key, value in theirs.items():
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
    biases = said.pop("sequence_bias", ())
    if any(len(tokens) > 1 for tokens, _ in biases):
        unsupported["sequence_bias"] = theirs["sequence_bias"]
    elif biases:
        said["sequence_bias"] = tuple((tokens[0], bias) for tokens, bias in biases)
    settings = dataclasses.replace(beside, **said, said=beside.said | frozenset(said))
    if settings.num_beams > 1:
        if settings.do_sample:  # nothing is drawn in a beam search here
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
        unsupported.pop("renormalize_logits", None)  # neither a draw nor the likeliest token changes
    if not settings.do_sample:
        unsupported = {key: value for key, value in unsupported.items() if key not in _OF_DRAWING}
    return dataclasses.replace(settings, unsupported=unsupported)


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
    """A number that keeps the rule as float32, which it is used as."""

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


def _array(tokens: tuple[int, ...]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


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
        text.encode()  # half a surrogate pair is no text
    return texts


def _early_stopping(value: Any) -> Any:
    _check(isinstance(value, bool) or value == "never")
    return value


_LIST = "a token or a list of them"
_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "do_sample": ("true or false", _flag),
    "temperature": ("at least 0 and finite", _real(lambda x: x >= 0)),
    "top_k": ("a whole number, at least 0 and below 2 ** 31", _whole(0)),
    "top_p": ("at least 0 and at most 1", _real(lambda x: 0 <= x <= 1)),
    "min_p": ("at least 0 and at most 1", _real(lambda x: 0 <= x <= 1)),
    "repetition_penalty": ("above 0 and finite", _real(lambda x: x > 0)),
    "no_repeat_ngram_size": ("a whole number, at least 0 and below 2 ** 31", _whole(0)),
    "sequence_bias": ("a list of pairs, [tokens, number]", _biases),
    "bad_words_ids": ("a list of lists of tokens", _words),
    "min_length": ("a whole number, at least 0 and below 2 ** 31", _whole(0)),
    "min_new_tokens": ("a whole number, at least 0 and below 2 ** 31", _whole(0)),
    "forced_bos_token_id": ("one token", _one_token),
    "forced_eos_token_id": (_LIST, _tokens),
    "suppress_tokens": (_LIST, _tokens),
    "begin_suppress_tokens": (_LIST, _tokens),
    "num_beams": ("a whole number, at least 1 and below 2 ** 31", _whole(1)),
    "length_penalty": ("a finite number", _real(math.isfinite)),
    "early_stopping": ('true, false or "never"', _early_stopping),
    "num_return_sequences": ("a whole number, at least 1 and below 2 ** 31", _whole(1)),
    "max_length": ("a whole number, at least 1 and below 2 ** 31", _whole(1)),
    "max_new_tokens": ("a whole number, at least 1 and below 2 ** 31", _whole(1)),
    "stop_strings": ("a string or a list of them, none of them empty", _texts),
    "eos_token_id": (_LIST, _tokens),
    "bos_token_id": ("one token", _one_token),
    "decoder_start_token_id": ("one token", _one_token),
}
"""What a value must be, and what reads it, or raises for another."""

_TOKENS = ("eos_token_id", "bos_token_id", "decoder_start_token_id")

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
"""What changes texts and has no place here, with the values that change nothing."""

_OF_DRAWING = frozenset(("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p"))

_INERT = frozenset(
    (
        # who wrote the file, and what is returned
        *("transformers_version", "pad_token_id", "return_dict_in_generate", "return_legacy_cache"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        # how transformers computes the same: caches, drafts
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "remove_invalid_values"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
    )
)
