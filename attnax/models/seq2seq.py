"""The encoder-decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import CacheFunction, CacheKind
from attnax.checks import check_options, is_concrete
from attnax.config import EncoderDecoderConfig, TransformerConfig, resolve_config
from attnax.generation.beam import Beams, EarlyStopping
from attnax.generation.loop import Generation, Stream
from attnax.generation.request import padded_length, place_like
from attnax.generation.samplers import Sampler
from attnax.generation.step import Tokens
from attnax.masks import Mask, padding
from attnax.models.call_masks import State
from attnax.models.planned_caches import scalar_heads
from attnax.models.transformer import TokenHead, TokenOptions, TransformerDecoder, TransformerEncoder, count_positions
from attnax.models.writing import (
    WriteOptions,
    Writer,
    beam_search,
    check_mesh,
    generate,
    prompt_or_positions,
    stream,
)
from attnax.nn._parts import MakeBlock
from attnax.nn._run import Mode, SelfAttentionOptions, overrides_call, run_of, runs, select_options
from attnax.nn.attention import KeysValues
from attnax.nn.blocks import Output, add_aux
from attnax.nn.embeddings import TokenEmbedding
from attnax.nn.probe import Probe, with_probe
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, AttentionFn, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["Transformer"]


class TransformerOptions(SelfAttentionOptions, total=False):
    """The options of `Transformer`, which `__call__` describes."""

    mask: Mask | MaskMod | ArrayLike | None
    self_mask: Mask | MaskMod | ArrayLike | None
    source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None
    target_padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None


class Transformer(nnx.Module):
    """Reads a source with an encoder and writes a target with a decoder that attends the source.

    The tokens of the source all attend each other. Those of the target attend under a causal mask, which the
    `self_mask` of a call replaces.

    Called as `Transformer(rngs, config)`, with two configs as `Transformer(rngs, encoder, decoder)`, or with the fields
    of EncoderDecoderConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: an EncoderDecoderConfig, or the encoder's TransformerConfig.
        decoder: the decoder's TransformerConfig.
        make_encoder_block: the `make_block` of the encoder, as in `TransformerEncoder`.
        make_decoder_block: the `make_block` of the decoder. Its blocks get `encoder_output` and the other options of
            `DecoderBlock.run`; for `generate` they have a `cross_attention`.
        attention_fn: of self-attention in every layer of both halves; a function without arrays.
        **fields: the fields of EncoderDecoderConfig: `encoder`, `decoder` and `share_embeddings`.

    Raises:
        ValueError: not two TransformerConfigs, or `share_embeddings` with configs that cannot share them.

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

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: EncoderDecoderConfig | TransformerConfig | None = None,
        decoder: TransformerConfig | Mapping[str, Any] | None = None,
        *,
        make_encoder_block: MakeBlock | None = None,
        make_decoder_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        if decoder is not None:
            fields["decoder"] = decoder
        if isinstance(config, TransformerConfig):
            if "encoder" in fields:
                raise ValueError("Transformer: encoder must be given once; got it by position and by name.")
            config, fields = None, {"encoder": config, **fields}
        config = resolve_config(EncoderDecoderConfig, config, fields)
        self.encoder = TransformerEncoder(
            rngs, config.encoder, make_block=make_encoder_block, attention_fn=attention_fn
        )
        self.decoder = TransformerDecoder(
            rngs,
            config.decoder,
            cross_attention=True,
            encoder_features=config.encoder.d_model,
            own_tokens=not config.share_embeddings,
            make_block=make_decoder_block,
            attention_fn=attention_fn,
        )
        self.head = TokenHead(rngs, config.decoder)

    @property
    def config(self) -> EncoderDecoderConfig:
        """The configs of both halves."""
        shared = self.decoder.embed.tokens is None
        return EncoderDecoderConfig(encoder=self.encoder.config, decoder=self.decoder.config, share_embeddings=shared)

    @property
    def _shared_tokens(self) -> TokenEmbedding | None:
        """The encoder's table of token embeddings, if the decoder has none."""
        return self.encoder.embed.tokens if self.decoder.embed.tokens is None else None

    def _logits(self, hidden: Array) -> Array:
        return self.head(hidden, self._shared_tokens or self.decoder.embed.tokens)

    def __call__(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        target_padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        score_mod: ScoreMod | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits (batch, T, vocab_size) of the token after each target token.

        Arguments and errors are as in `TransformerEncoder`, for two texts:
            source_ids: (batch, S), of the encoder's vocabulary.
            target_ids: (batch, T), of the decoder's vocabulary.
            mask: of the decoder's self-attention.
            self_mask: in place of the mask of the decoder's self-attention.
            source_padding_mask: True for real tokens, (batch, S) or (batch, 1, 1, S).
            target_padding_mask: True for real tokens of the target, (batch, T) or (batch, 1, 1, T).
            score_mod: applied to the self-attention scores of every decoder layer.
        """
        options: TransformerOptions = {"score_mod": score_mod, "deterministic": deterministic, "rngs": rngs}
        options |= {"mask": mask, "self_mask": self_mask}
        options |= {"source_padding_mask": source_padding_mask, "target_padding_mask": target_padding_mask}
        return self.run(source_ids, target_ids, **options).logits

    def run(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        *,
        probe: Probe | None = None,
        **options: Unpack[TransformerOptions],
    ) -> Output:
        """The decoder's hidden states and their logits, with the losses of both halves in `aux`.

        A `probe` is of the decoder; `encoder.run(source_ids, probe=...)` probes the encoder.
        """
        out = self.read(source_ids, target_ids, probe=probe, **options)
        return out._replace(logits=self._logits(out.hidden))

    def read(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        *,
        probe: Probe | None = None,
        **options: Unpack[TransformerOptions],
    ) -> Output:
        """`run` without the logits, for a loss that computes those of a few tokens at a time."""
        check_options("Transformer", options, TransformerOptions)
        source_ids, padding_mask, real = jnp.asarray(source_ids), options.get("source_padding_mask"), None
        if padding_mask is not None:
            real = self.encoder._real_tokens(padding_mask, source_ids.shape)
        encoded = run_of(self.encoder)(source_ids, padding_mask=real, **select_options(options, Mode))
        out = run_of(self.decoder)(
            target_ids,
            padding_mask=options.get("target_padding_mask"),
            encoder_output=encoded.hidden,
            cross_mask=None if real is None else padding(real),
            encoder_position_ids=None if real is None else count_positions(real.shape, real, None),
            token_embedding=self._shared_tokens,
            **with_probe(probe),
            **select_options(options, TokenOptions),
        )
        return out._replace(aux=add_aux(encoded.aux, out.aux))

    def log_probs(
        self,
        source_ids: Int[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
        **options: Unpack[TransformerOptions],
    ) -> Float[Array, "B T V"]:
        """Log-probabilities of the token after each target token; options as in a call."""
        return jax.nn.log_softmax(self(source_ids, target_ids, **options))

    def generate(
        self,
        source_ids: Int[ArrayLike, "B S"],
        max_length: int,
        start_token: int,
        end_token: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        key: Array | None = None,
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        sampler: Sampler | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        num_samples: int = 1,
        draft: Transformer | None = None,
        num_draft_tokens: int = 4,
        cache: CacheKind | CacheFunction | None = None,
        cache_dtype: Any = None,
    ) -> Generation:
        """Writes a target for each source, in two compiled programs that serve sources of several lengths.

        Arguments, result and errors are as in `TransformerLM.generate`, with sources in place of prompts, and:

        - `source_ids`: (batch, S).
        - `max_length`: tokens to write at most, the start token not counted.
        - `start_token`: the first token of every target, not part of the result.
        - `mask`: of the decoder's self-attention, as `self_mask` and `score_mod` are. Positions are those of the
          target, whose start token is at 0.
        - `temperature`: of the sampling, in place of a `sampler`; 0 takes the likeliest token.
        - `source_padding_mask`: (batch, S) or (batch, 1, 1, S), True for real tokens.
        - `draft`: a small Transformer of the same vocabularies.
        """
        if draft is not None and not isinstance(draft, Transformer):
            raise ValueError(f"generate: a draft must be a Transformer too; got {type(draft).__name__}.")
        if sampler is not None and temperature != 0.0:
            raise ValueError(
                f"generate: give temperature or sampler, not both; got temperature={temperature}. "
                "Use Sampler(temperature=...)."
            )
        options: WriteOptions = {"sampler": sampler or Sampler(temperature=temperature), "key": key}
        options |= {"end_token": end_token, "stop_sequences": stop_sequences, "num_samples": num_samples}
        options |= {"cache": cache, "cache_dtype": cache_dtype}
        options |= {"mask": mask, "self_mask": self_mask, "score_mod": score_mod}
        return generate(
            self._writer("generate", source_ids, source_padding_mask),
            _starts(source_ids, start_token),
            None if draft is None else draft._writer("generate", source_ids, source_padding_mask),
            max_new_tokens=max_length,
            num_draft_tokens=num_draft_tokens,
            **options,
        )

    def stream(
        self,
        source_ids: Int[ArrayLike, "B S"],
        max_length: int,
        start_token: int,
        *,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        **options: Unpack[WriteOptions],
    ) -> Stream:
        """Yields the tokens of `generate` as they are drawn, (rows,) at a time; its options, but no draft."""
        check_options("Transformer.stream", options, WriteOptions)
        writer = self._writer("stream", source_ids, source_padding_mask)
        return stream(writer, _starts(source_ids, start_token), max_new_tokens=max_length, **options)

    def beam_search(
        self,
        source_ids: Int[ArrayLike, "B S"],
        max_length: int,
        start_token: int,
        end_token: int | Sequence[int] | None = None,
        *,
        num_beams: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = "heuristic",
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        source_padding_mask: Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"] | None = None,
        sampler: Sampler | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        cache: CacheKind | CacheFunction | None = None,
        cache_dtype: Any = None,
    ) -> Beams:
        """The `num_beams` best targets found for each source; arguments as in `TransformerLM.beam_search`."""
        options: WriteOptions = {"sampler": sampler, "end_token": end_token, "stop_sequences": stop_sequences}
        options |= {"cache": cache, "cache_dtype": cache_dtype}
        options |= {"mask": mask, "self_mask": self_mask, "score_mod": score_mod}
        return beam_search(
            self._writer("beam_search", source_ids, source_padding_mask),
            _starts(source_ids, start_token),
            max_new_tokens=max_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            **options,
        )

    def _writer(self, caller: str, source_ids: ArrayLike, source_padding_mask: ArrayLike | None) -> Writer:
        """The decoder as a writer, with the sources as its context."""
        if overrides_call(self) or not runs(self, _RUN):
            raise NotImplementedError(
                f"{caller}: a target is written token by token, by encoder.run and decoder.run; "
                f"got {type(self).__name__} with a __call__ or run of its own, which would be ignored. "
                "Override run of the encoder or the decoder."
            )
        if np.ndim(source_ids) != 2:
            raise ValueError(
                f"{caller}: source_ids must be of shape (batch, length); got source_ids.shape={np.shape(source_ids)}."
            )
        xp = np if is_concrete(source_ids) and is_concrete(source_padding_mask) else jnp
        placed, source_ids = source_ids, xp.asarray(source_ids)
        self.encoder.embed.tokens.check(source_ids)
        real = xp.ones(source_ids.shape, bool)
        if source_padding_mask is not None:
            real = xp.asarray(self.encoder._real_tokens(source_padding_mask, source_ids.shape))
        length = source_ids.shape[1]
        # Padded to a few lengths, so that few programs serve all, but not beyond the encoder's longest text.
        config, mask = self.encoder.config, self.encoder.self_mask
        is_fixed = mask is not None and mask.num_positions is not None
        padded = length if is_fixed else padded_length(max(2, length))
        padded = padded if config.pos_emb_type == "relative" else min(padded, config.max_len)
        missing = ((0, 0), (0, max(0, padded - length)))
        graphdef, state = nnx.split(self)
        check_mesh(caller, state)
        ids, padded_real = (place_like(placed, xp.pad(x, missing)) for x in (source_ids, real))
        context = _Source(ids, padded_real, graphdef)
        heads, mask = scalar_heads(self.decoder.stack), self.decoder.self_mask
        return Writer(caller, _Step(graphdef), State(state), self.decoder.config, context, mask, heads)


_RUN = Transformer.run  # a function that is assigned to the class later counts as an override


def _starts(source_ids: ArrayLike, start_token: int) -> np.ndarray:
    return np.full((source_ids.shape[0], 1), start_token, np.int32)


@pytree_dataclass
class _Source:
    """Sources; the program that reads the prompts encodes them."""

    ids: Int[ArrayLike, "B S"]
    real: Bool[ArrayLike, "B S"]
    graphdef: nnx.GraphDef[Transformer] = dataclasses.field(metadata={"static": True})

    def make(self, state: State, /) -> tuple[tuple[KeysValues, ...], Bool[Array, "B S"], Int[Array, "B"]]:
        """Keys and values of the sources for each cross-attention, True for their real tokens, and their indices."""
        model, real = nnx.merge(self.graphdef, state.params), jnp.asarray(self.real)
        encoded = run_of(model.encoder)(self.ids, padding_mask=real, deterministic=True).hidden
        rows = jnp.arange(real.shape[0], dtype=jnp.int32)
        return model.decoder.keys_values(encoded, count_positions(real.shape, real, None)), real, rows


@dataclasses.dataclass(frozen=True)
class _Step:
    """The decoder as a function of the state; the context is what `_Source` makes."""

    graphdef: nnx.GraphDef[Transformer]

    def __call__(self, state: State, tokens: Tokens, cache: Any) -> tuple[Array, Any]:
        contexts, real, rows = tokens.context
        model = nnx.merge(self.graphdef, state.params)
        out = run_of(model.decoder)(
            tokens.ids,
            caches=cache,
            encoder_output=contexts,
            cross_mask=padding(real),
            token_embedding=model._shared_tokens,
            deterministic=True,
            **prompt_or_positions(tokens, cache),
            **state.mask_options(tokens, rows),
        )
        hidden = jnp.take_along_axis(out.hidden, tokens.wanted[..., None], axis=1)
        return model._logits(hidden), out.caches
