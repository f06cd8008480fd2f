"""The encoder-decoder."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.cache import LayerCache, init_decoder_kv_caches_from_config
from attnax.config import TransformerConfig
from attnax.generation import loop
from attnax.generation.loop import Generation
from attnax.generation.samplers import Sampler
from attnax.masks import padding
from attnax.models.transformer import TokenHead, TransformerDecoder, TransformerEncoder, check_table, count_positions
from attnax.nn.attention import KeysValues
from attnax.nn.blocks import Output, add_aux
from attnax.typing import Array, ArrayLike, Bool, Float, Int, ScoreMod

__all__ = ["Transformer"]


class Transformer(nnx.Module):
    """Reads a source with an encoder and writes a target with a decoder that attends it.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        encoder: a TransformerConfig; vocabulary, depth and widths are its own.
        decoder: a TransformerConfig.

    Raises:
        ValueError: something else than two TransformerConfigs.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import Transformer, TransformerConfig
        >>> config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16, max_len=32)
        >>> model = Transformer(nnx.Rngs(0), encoder=config, decoder=config)
        >>> model(jnp.zeros((1, 7), int), jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
        >>> model.generate(jnp.zeros((1, 7), int), max_length=3, start_token=1, end_token=2).tokens.shape
        (1, 3)

    References:
        A. Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, rngs: nnx.Rngs, encoder: TransformerConfig, decoder: TransformerConfig):
        for name, config in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(config, TransformerConfig):
                raise ValueError(f"Transformer: {name} must be a TransformerConfig; got {type(config).__name__}.")
        self.encoder = TransformerEncoder(rngs, encoder)
        self.decoder = TransformerDecoder(rngs, decoder, cross_attention=True, encoder_features=encoder.d_model)
        self.head = TokenHead(rngs, decoder)

    def __call__(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        *,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        target_padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        score_mod: ScoreMod | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits (batch, T, vocab_size) of the token that follows each target token.

        Args:
            source_ids: (batch, S), of the encoder's vocabulary.
            target_ids: (batch, T), of the decoder's.
            source_padding_mask: True for real tokens, (batch, S) or (batch, 1, 1, S).
            target_padding_mask: the same for the target.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            score_mod: applied to the self-attention scores of every decoder layer.
            rngs: randomness of the dropout, instead of the stored streams.

        Raises:
            ValueError: ids outside a vocabulary, sequences longer than max_len, or arguments that do not fit.
        """
        return self.run(
            source_ids,
            target_ids,
            source_padding_mask=source_padding_mask,
            target_padding_mask=target_padding_mask,
            deterministic=deterministic,
            score_mod=score_mod,
            rngs=rngs,
        ).hidden

    def run(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        *,
        source_padding_mask: ArrayLike | None = None,
        target_padding_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        score_mod: ScoreMod | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Output:
        """The call with logits in `hidden` and the losses of both halves in `aux`."""
        mode: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        source_ids, real = jnp.asarray(source_ids), None
        if source_padding_mask is not None:
            real = self.encoder._real_tokens(source_padding_mask, source_ids.shape)
        encoded = self.encoder.run(source_ids, padding_mask=real, **mode)
        out = self.decoder.run(
            target_ids,
            padding_mask=target_padding_mask,
            score_mod=score_mod,
            encoder_output=encoded.hidden,
            cross_mask=None if real is None else padding(real),
            encoder_position_ids=None if real is None else count_positions(real.shape, real, None),
            **mode,
        )
        return Output(self.head(out.hidden, self.decoder.embed), None, add_aux(encoded.aux, out.aux))

    def log_probs(
        self, source_ids: Int[ArrayLike, "B S"], target_ids: Int[ArrayLike, "B T"], **options: Any
    ) -> Float[Array, "B T V"]:
        """Log-probabilities of the token that follows each target token; options as in a call."""
        return jax.nn.log_softmax(self(source_ids, target_ids, **options))

    def generate(
        self,
        source_ids: Int[ArrayLike, "B S"],
        max_length: int,
        start_token: int,
        end_token: int | None = None,
        temperature: float = 0.0,
        key: Array | None = None,
        *,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        sampler: Sampler | None = None,
    ) -> Generation:
        """Writes a target for each source, in one compiled loop; later calls of the same shape compile nothing.

        Args:
            source_ids: (batch, S).
            max_length: tokens to write at most, the start token not counted.
            start_token: what the target begins with.
            end_token: ends a row.
            temperature: of the sampling; 0 takes the likeliest token.
            key: one typed key, or one a row; needed with a temperature.
            source_padding_mask: (batch, S) or (batch, 1, 1, S), True for real tokens.
            sampler: how tokens are drawn, in place of `temperature`.

        Returns:
            tokens (batch, max_length) without the start token, lengths and log_probs.

        Raises:
            ValueError: arguments out of range, or more positions than a learned or sinusoidal table has.
        """
        config = self.decoder.config
        if sampler is not None and temperature != 0.0:
            raise ValueError(
                f"generate: give temperature or sampler, not both; got temperature={temperature}. "
                "Use Sampler(temperature=...)."
            )
        source_ids = jnp.asarray(source_ids)
        batch = source_ids.shape[0]
        request = loop.make_request(
            jnp.full((batch, 1), start_token, jnp.int32),
            vocab_size=config.vocab_size,
            max_new_tokens=max_length,
            sampler=Sampler(temperature=temperature) if sampler is None else sampler,
            key=key,
            padding_mask=None,
            end_token=end_token,
        )
        check_table(config, 1, max_length)
        self.encoder.embed.tokens.check(source_ids)
        graphdef, state = nnx.split(self)
        if source_padding_mask is not None:
            source_padding_mask = self.encoder._real_tokens(source_padding_mask, source_ids.shape)
        real = source_padding_mask
        contexts = _read_source(graphdef, state, source_ids, real)
        cache = init_decoder_kv_caches_from_config(config, batch_size=batch, max_len=1 + max_length)
        reading = (state, contexts, real)
        return loop.generate(_Step(graphdef), reading, request, cache, max_new_tokens=max_length)[0]


@partial(jax.jit, static_argnames="graphdef")
def _read_source(graphdef: Any, state: Any, source_ids: Array, real: Array | None) -> tuple[KeysValues, ...]:
    model = nnx.merge(graphdef, state)
    encoded = model.encoder(source_ids, padding_mask=real, deterministic=True)
    return model.decoder.keys_values(encoded, None if real is None else count_positions(real.shape, real, None))


@dataclasses.dataclass(frozen=True)
class _Step:
    """The decoder as a function of the state, which also holds what its cross-attention reads."""

    graphdef: nnx.GraphDef[Transformer]

    def __call__(
        self, state: Any, ids: Array, position_ids: Array, cache: tuple[LayerCache, ...]
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        state, contexts, real = state
        model = nnx.merge(self.graphdef, state)
        out = model.decoder.run(
            ids,
            position_ids=position_ids,
            caches=cache,
            encoder_output=contexts,
            cross_mask=None if real is None else padding(real),
            deterministic=True,
        )
        return model.head(out.hidden[:, -1], model.decoder.embed), out.caches
