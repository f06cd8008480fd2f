"""The settings of transformers with which a checkpoint generates text, translated for our models."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from attnax.errors import InputError
from attnax.generation import TokenRules
from attnax.generation.beam import EarlyStopping
from attnax.generation.candidates import CUTS
from attnax.generation.samplers import Sampler
from attnax.models.seq2seq import Transformer
from attnax.pretrained.errors import quoted
from attnax.typing import ArrayLike

__all__ = ["NAME", "GenerationSettings"]

NAME = "generation_config.json"
_NEW_TOKENS = 20  # the default of transformers
_EARLY_STOPPING: dict[Any, EarlyStopping] = {False: "heuristic", True: "first", "never": "never"}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """The content of a `generation_config.json`, with the names and defaults of transformers.

    `dataclasses.replace` changes a setting.

    Attributes:
        do_sample: whether tokens are drawn; if not, `temperature`, `top_k`, `top_p` and `min_p` have no effect.
        temperature: of the draw.
        top_k: number of the likeliest tokens to draw from; 0 is all.
        top_p: probability of the likeliest tokens to draw from.
        min_p: smallest probability of a token to draw, relative to the likeliest.
        repetition_penalty: as in a `Sampler`.
        no_repeat_ngram_size: `no_repeat_ngram` of a `Sampler`, or 0.
        sequence_bias: pairs of a token and a number that is added to its logit.
        bad_words_ids: sequences of tokens that never occur.
        min_length: smallest number of tokens before a text may end, the prompt or the start token included.
        min_new_tokens: smallest number of new tokens before a text may end; replaces `min_length`.
        forced_bos_token_id: the token that follows the start token, or a prompt of one token.
        forced_eos_token_id: tokens, one of which ends a text of the greatest length.
        suppress_tokens: tokens that never occur.
        begin_suppress_tokens: tokens that do not occur first.
        num_beams: of a beam search; 1 is no search.
        length_penalty: of a beam search.
        early_stopping: of a beam search.
        num_return_sequences: texts for each prompt.
        max_length: greatest number of tokens, the prompt or the start token included.
        max_new_tokens: greatest number of new tokens; replaces `max_length`.
        stop_strings: strings that end a text; only `attnax generate` obeys them.
        eos_token_id: tokens that end a text.
        bos_token_id: the token that starts a text.
        decoder_start_token_id: the token that starts a text of an encoder-decoder; replaces `bos_token_id`.
        said: names of the settings that the file gives.
        unsupported: settings of the file that would change the text and are not obeyed.
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
        """The token that starts a text of an encoder-decoder."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id

    @property
    def says_how(self) -> bool:
        """Whether the file decides how tokens are chosen: by a draw, by a search, or greedily."""
        return not self.said.isdisjoint(("do_sample", "temperature", *CUTS, "num_beams"))

    def arguments(self, model: Any, prompt_ids: ArrayLike) -> dict[str, Any]:
        """The keywords with which a model writes the texts that transformers' `generate` writes with these settings.

        They are keywords of the model's `generate`, or, if `num_beams` is above 1, of its `beam_search`. The result of
        a search is its first `num_return_sequences` texts. A draw also needs a key.

        Args:
            model: a TransformerLM, or a Transformer.
            prompt_ids: (batch, T). The T tokens of a prompt count in `max_length` and `min_length` of a TransformerLM,
                not of a Transformer.

        Raises:
            InputError: a prompt of `max_length` tokens, a forced token that the model lacks, or no start token.
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
            given = f"stop_strings={quoted(list(self.stop_strings))}"
            warnings.warn(f"{given} end nothing without a tokenizer. Give stop_sequences of tokens.", stacklevel=2)
        is_search = self.num_beams > 1
        fields = self.penalties() | self.constraints(config.vocab_size, length, room)
        sampler = Sampler(**fields, **({} if is_search else self.drawing()))
        named |= {"sampler": sampler, "end_token": [token for token in self.eos_token_id if token < config.vocab_size]}
        if is_search:
            return named | {"num_beams": self.num_beams} | self.search()
        return named | ({"num_samples": self.num_return_sequences} if self.do_sample else {})

    def room(self, length: int) -> int | None:
        """The greatest number of new tokens after a prompt of `length`; None if no setting limits it.

        Raises:
            InputError: there is no room.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= length:
            raise InputError(
                f"max_length={self.max_length} of the checkpoint leaves no room after the prompt's {length} tokens, "
                "which count too. Say how many new tokens to write."
            )
        return self.max_length - length

    def drawing(self) -> dict[str, Any]:
        """The fields of a `Sampler` for the draw."""
        if not self.do_sample or self.top_p == 0.0:  # a top_p of 0 leaves one token
            return {"temperature": 0.0}
        fields = {"temperature": self.temperature, "top_k": self.top_k or None, "min_p": self.min_p}
        return fields | {"top_p": None if self.top_p == 1.0 else self.top_p}

    def penalties(self) -> dict[str, Any]:
        """The fields of a `Sampler` against repetition."""
        penalty = None if self.repetition_penalty == 1.0 else self.repetition_penalty
        return {"repetition_penalty": penalty, "no_repeat_ngram": self.no_repeat_ngram_size or None}

    def search(self) -> dict[str, Any]:
        """The keywords of a beam search, except for the number of beams."""
        return {"length_penalty": self.length_penalty, "early_stopping": _EARLY_STOPPING[self.early_stopping]}

    def constraints(self, vocab_size: int, length: int, max_new_tokens: int) -> dict[str, Any]:
        """The fields of a `Sampler` that forbid and force tokens, for prompts of `length`.

        Raises:
            InputError: a forced token is not below `vocab_size`.
        """
        first = self.forced_bos_token_id if length == 1 else None
        start = () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        forced = {"forced_bos_token_id": start, "forced_eos_token_id": self.forced_eos_token_id}
        for key, tokens in forced.items():
            if any(token >= vocab_size for token in tokens):
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
            rules["begin_suppress_tokens"] = _array(self.begin_suppress_tokens)
            rules["begin_index"] = np.int32(first is not None)
        bias = {token: value for token, value in self.sequence_bias if token < vocab_size}
        return {"logit_bias": bias or None, "logits_fn": TokenRules(**rules) if rules else None}

    def complaint(self, obeyed: Collection[str] = ()) -> str | None:
        """One sentence about the settings of the file that are not obeyed, or None if there are none.

        Args:
            obeyed: unsupported settings that the caller obeys.
        """
        left = {key: value for key, value in self.unsupported.items() if key not in obeyed}
        if not left:
            return None
        named = ", ".join(f"{key}={quoted(value)}" for key, value in left.items())
        return f"{NAME}: not supported, and left out: {named}."


def _array(tokens: tuple[int, ...]) -> np.ndarray:
    return np.asarray(tokens, np.int32)
