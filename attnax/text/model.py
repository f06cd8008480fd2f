"""A model that writes text, with its codec, from a run or a published checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.models import Transformer, TransformerLM
from attnax.pretrained.generation_config import GenerationSettings
from attnax.text.codec import Codec
from attnax.typing import Array

__all__ = ["TextModel", "Translator", "prompt_array"]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A language model with its codec. The text that it writes continues the prompt.

    Attributes:
        folder: of the model.
        model: such as `TransformerLM`.
        codec: of its tokens.
        settings: the authors' settings of generation.
    """

    folder: Path
    model: Any
    codec: Codec
    settings: GenerationSettings = dataclasses.field(default_factory=GenerationSettings, kw_only=True)
    goes_on: ClassVar[bool] = True  # the text begins with the prompt

    @property
    def config(self) -> TransformerConfig:
        """The config of the decoder."""
        config: TransformerConfig = self.model.config
        return config

    @property
    def context(self) -> int | float:
        """Number of tokens of the longest text; infinite for relative positions."""
        return _longest(self.config)

    def begin(self, ids: Sequence[int]) -> list[int]:
        """The tokens before the first new token, for a prompt of these tokens."""
        return list(ids)

    def options(self, room: int) -> dict[str, Any]:
        """Keywords of the model's `generate`, `stream` and `beam_search` for at most `room` new tokens."""
        return {"max_new_tokens": room}

    def check(self, ids: Sequence[int]) -> None:
        """Raises InputError for a prompt that the model cannot read."""
        _check_ids(ids, self.config, self.folder)

    def log_prob(self, ids: Sequence[int], rows: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each text after the prompt, from one forward pass."""
        begin = self.begin(ids)
        longest = max(map(len, rows))
        texts = np.zeros((len(rows), len(begin) + longest), np.int32)  # padding at the end changes no earlier token
        for text, row in zip(texts, rows, strict=True):
            text[: len(begin) + len(row)] = [*begin, *row]
        given = np.asarray(self._log_probs(ids, jnp.asarray(texts[:, :-1])))
        totals = []
        for text, row, log_probs in zip(texts, rows, given, strict=True):
            places = np.arange(len(begin), len(begin) + len(row))
            totals.append(float(log_probs[places - 1, text[places]].sum()))
        return totals

    def _log_probs(self, ids: Sequence[int], texts: Array) -> Array:
        return nnx.jit(TransformerLM.log_probs)(self.model, texts)


@dataclasses.dataclass(frozen=True)
class Translator(TextModel):
    """An encoder-decoder with its codec. Its encoder reads the prompt, and its decoder writes a new text.

    Attributes:
        start: the token that starts the new text.
    """

    start: int
    goes_on: ClassVar[bool] = False

    @property
    def config(self) -> TransformerConfig:
        """The config of the decoder."""
        config: TransformerConfig = self.model.decoder.config
        return config

    def begin(self, ids: Sequence[int]) -> list[int]:
        return [self.start]

    def options(self, room: int) -> dict[str, Any]:
        return {"max_length": room, "start_token": self.start}

    def check(self, ids: Sequence[int]) -> None:
        encoder = self.model.encoder.config
        _check_ids(ids, encoder, self.folder)
        _check_ids([self.start], self.config, self.folder)
        if len(ids) > _longest(encoder):
            raise InputError(
                f"the prompt is too long: it has {len(ids)} tokens, and the encoder of {self.folder} reads at most "
                f"{encoder.max_len}."
            )

    def _log_probs(self, ids: Sequence[int], texts: Array) -> Array:
        source = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (len(texts), len(ids)))
        return nnx.jit(Transformer.log_probs)(self.model, source, texts)


def _longest(config: TransformerConfig) -> int | float:
    return math.inf if config.pos_emb_type == "relative" else config.max_len


def _check_ids(ids: Sequence[int], config: TransformerConfig, folder: Path) -> None:
    if max(ids) >= config.vocab_size:
        raise InputError(
            f"the tokenizer of {folder} gives the token {max(ids)}, and the model has only {config.vocab_size} "
            "embeddings; tokenizer and model do not belong together."
        )


def prompt_array(ids: Sequence[int]) -> jax.Array:
    """The ids as a batch of one."""
    return jnp.asarray(ids, jnp.int32)[None]
