"""The decoder-only language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import KVLayerCache, init_decoder_kv_caches_from_config
from attnax.config import TransformerConfig, resolve_config
from attnax.generation import loop
from attnax.generation.loop import Generation
from attnax.generation.samplers import Sampler
from attnax.masks import Mask
from attnax.models.transformer import TransformerDecoder
from attnax.nn.blocks import Output
from attnax.nn.linear import Linear
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
        /,
        *,
        self_mask: Mask | MaskMod | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(TransformerConfig, config, fields)
        self.decoder = TransformerDecoder(rngs, config, self_mask=self_mask)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: tuple[KVLayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], tuple[KVLayerCache, ...]]:
        """Float32 logits (batch, T, vocab_size), or with caches the pair of them and the new caches.

        The arguments are those of `TransformerDecoder`.
        """
        out = self.run(
            input_ids,
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
        if self.head is None:
            return self.decoder.embed.attend(hidden)
        return self.head(hidden).astype(jnp.float32)

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
        if prompt_ids.ndim != 2 or prompt_ids.shape[1] < 1:
            raise ValueError(
                f"generate: prompt_ids must be (batch, length) with at least one token; got {prompt_ids.shape}."
            )
        if max_new_tokens < 1:
            raise ValueError(f"generate: max_new_tokens must be at least 1; got max_new_tokens={max_new_tokens}.")
        batch, length = prompt_ids.shape
        total, config = length + max_new_tokens, self.config
        if config.pos_emb_type in ("learned", "sinusoidal") and total > config.max_len + 1:
            raise ValueError(
                f"generate: prompt and new tokens must fit into the {config.max_len} positions of the model; "
                f"got {length} + {max_new_tokens}."
            )
        vocabulary = config.vocab_size
        known = np.asarray(prompt_ids)
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"generate: token ids must be at least 0 and below {vocabulary}; got {low if low < 0 else high}."
            )
        real = np.ones((batch, length), bool) if padding_mask is None else np.asarray(padding_mask)
        if real.shape != (batch, length) or real.dtype != bool or not real.any(axis=1).all():
            raise ValueError(
                f"generate: padding_mask must be boolean {(batch, length)} with a real token in every row; "
                f"got shape={real.shape}, dtype={real.dtype}."
            )
        sampler = (Sampler() if sampler is None else sampler).as_arrays()
        if key is None:
            if float(sampler.temperature) > 0:
                raise ValueError(
                    f"generate: sampling needs a key; got temperature={sampler.temperature}, key=None. "
                    "Pass key=jax.random.key(seed)."
                )
            key = jax.random.key(0)
        graphdef, state = nnx.split(self)
        positions = jnp.asarray(np.where(real, np.cumsum(real, axis=1) - 1, -1), jnp.int32)
        cache = init_decoder_kv_caches_from_config(config, batch_size=batch, max_len=total)
        end = jnp.int32(-1 if end_token is None else end_token)
        request = loop.Request(prompt_ids, positions, loop.row_keys(key, batch), sampler, end)
        return _Step(graphdef), state, request, cache


@dataclasses.dataclass(frozen=True)
class _Step:
    """The model as a function of its state; equal for models of equal structure."""

    graphdef: nnx.GraphDef[TransformerLM]

    def __call__(
        self, state: Any, ids: Array, position_ids: Array, cache: tuple[KVLayerCache, ...]
    ) -> tuple[Array, tuple[KVLayerCache, ...]]:
        model = nnx.merge(self.graphdef, state)
        out = model.decoder.run(ids, position_ids=position_ids, caches=cache, deterministic=True)
        last = position_ids.argmax(axis=1)  # only the last real token of each row goes through the head
        return model.logits(jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]), out.caches
