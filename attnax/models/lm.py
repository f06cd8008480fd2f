"""The decoder-only language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import LayerCache, init_decoder_kv_caches_from_config
from attnax.config import TransformerConfig, resolve_config
from attnax.generation import loop
from attnax.generation.loop import Generation
from attnax.generation.samplers import Sampler
from attnax.masks import Mask
from attnax.models.transformer import TokenHead, TransformerDecoder, check_table
from attnax.nn.blocks import Output
from attnax.typing import Array, ArrayLike, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["TransformerLM"]


class TransformerLM(nnx.Module):
    """A `TransformerDecoder` and its head: logits of the next token at every position.

    Called as `TransformerLM(rngs, config)` or with the fields of TransformerConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: who attends whom, by default `causal()`.
        **fields: the fields of TransformerConfig.

    Raises:
        ValueError: a field that TransformerConfig lacks, or a value that it refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16, max_len=32)
        >>> lm(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
        >>> lm.generate(jnp.zeros((1, 5), int), max_new_tokens=3).tokens.shape
        (1, 3)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        *,
        self_mask: Mask | MaskMod | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(TransformerConfig, config, fields)
        self.decoder = TransformerDecoder(rngs, config, self_mask=self_mask)
        self.head = TokenHead(rngs, config)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: tuple[LayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], tuple[Any, ...]]:
        """Float32 logits (batch, T, vocab_size), or with caches the pair of them and the new caches.

        The arguments are those of `TransformerDecoder`.
        """
        out = self.run(
            input_ids,
            mask=mask,
            padding_mask=padding_mask,
            deterministic=deterministic,
            position_ids=position_ids,
            score_mod=score_mod,
            caches=layer_kv_caches,
            rngs=rngs,
        )
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(self, input_ids: Int[ArrayLike, "B T"], **options: Any) -> Output:
        """`TransformerDecoder.run` with logits in `hidden`."""
        out = self.decoder.run(input_ids, **options)
        return out._replace(hidden=self.logits(out.hidden))

    def logits(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Float32 logits of the decoder's hidden states."""
        return self.head(hidden, self.decoder.embed)

    def log_probs(self, input_ids: Int[ArrayLike, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """Log-probabilities of the token that follows each position; options as in a call without caches."""
        return jax.nn.log_softmax(self.run(input_ids, **options).hidden)

    def generate(
        self,
        prompt_ids: Int[ArrayLike, "B T"],
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: Array | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        end_token: int | None = None,
    ) -> Generation:
        """Continues each prompt; the first call of a shape compiles one program, later ones none.

        Args:
            prompt_ids: (batch, T), T at least 1.
            max_new_tokens: at least 1.
            sampler: how tokens are drawn, by default the likeliest one.
            key: one typed key, or one a row; needed by a sampler with a temperature.
            padding_mask: (batch, T), True for real tokens, for prompts of different lengths.
            end_token: ends a row.

        Returns:
            tokens (batch, max_new_tokens), lengths and log_probs.

        Raises:
            ValueError: arguments out of range, a row without a token, or more positions than a learned or
                sinusoidal table has.
        """
        arguments = self._generation_arguments(prompt_ids, max_new_tokens, sampler, key, padding_mask, end_token)
        generation, _ = loop.generate(*arguments, max_new_tokens=max_new_tokens)
        return generation

    def stream(
        self,
        prompt_ids: Int[ArrayLike, "B T"],
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        key: Array | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        end_token: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The tokens of `generate`, (batch,) at a time, each as soon as it is drawn."""
        arguments = self._generation_arguments(prompt_ids, max_new_tokens, sampler, key, padding_mask, end_token)
        return loop.stream(*arguments, max_new_tokens=max_new_tokens)

    def _generation_arguments(
        self,
        prompt_ids: ArrayLike,
        max_new_tokens: int,
        sampler: Sampler | None,
        key: Array | None,
        padding_mask: ArrayLike | None,
        end_token: int | None,
    ) -> tuple[Any, ...]:
        prompt_ids = jnp.asarray(prompt_ids)
        request = loop.make_request(
            prompt_ids,
            vocab_size=self.config.vocab_size,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            padding_mask=padding_mask,
            end_token=end_token,
        )
        batch, length = prompt_ids.shape
        check_table(self.config, length, max_new_tokens)
        graphdef, state = nnx.split(self)
        cache = init_decoder_kv_caches_from_config(self.config, batch_size=batch, max_len=length + max_new_tokens)
        return _Step(graphdef), state, request, cache


@dataclasses.dataclass(frozen=True)
class _Step:
    """The model as a function of its state; equal for models of equal structure."""

    graphdef: nnx.GraphDef[TransformerLM]

    def __call__(
        self, state: Any, ids: Array, position_ids: Array, cache: tuple[LayerCache, ...]
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        model = nnx.merge(self.graphdef, state)
        out = model.decoder.run(ids, position_ids=position_ids, caches=cache, deterministic=True)
        last = position_ids.argmax(axis=1)  # only the last real token of each row goes through the head
        return model.logits(jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]), out.caches
