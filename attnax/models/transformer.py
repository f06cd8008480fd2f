"""Stacks of blocks over token embeddings: the encoder and the decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import EmptyCache, LayerCache
from attnax.checks import check_positions
from attnax.config import TransformerConfig, resolve_config
from attnax.kernels.score_mods import compose_score_mods
from attnax.masks import Causal, Mask, as_mask, at_positions, causal, padding
from attnax.nn.attention import KeysValues
from attnax.nn.blocks import DecoderBlock, EncoderBlock, Output
from attnax.nn.embeddings import RelativePositionBias, TokenEmbedding, TransformerEmbedding
from attnax.nn.linear import Linear
from attnax.nn.norms import norm_of
from attnax.nn.stack import Stack
from attnax.typing import Array, ArrayLike, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["TokenHead", "TransformerDecoder", "TransformerEncoder", "count_positions"]


class _TokenTransformer(nnx.Module):
    """Embeddings, blocks and a last norm: what the encoder and the decoder have in common."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig,
        make_block: Any,
        self_mask: Any,
        *,
        bidirectional: bool,
        own_tokens: bool = True,
    ):
        self.config = config
        self.embed = TransformerEmbedding(rngs, config, own_tokens=own_tokens)
        self.stack = Stack(rngs, config, make_block)
        # After "post" blocks the stream is normalised already.
        self.norm = nnx.data(None if config.norm_placement == "post" else norm_of(config, rngs))
        self.relative_bias = nnx.data(
            RelativePositionBias(rngs, config, bidirectional=bidirectional)
            if config.pos_emb_type == "relative"
            else None
        )
        self.self_mask = nnx.data(None if self_mask is None else as_mask(self_mask))

    def _run(
        self,
        input_ids: ArrayLike,
        *,
        mask: Mask | MaskMod | ArrayLike | None,
        padding_mask: ArrayLike | None,
        position_ids: ArrayLike | None,
        score_mod: ScoreMod | None,
        caches: tuple[LayerCache, ...] | None,
        deterministic: bool | None,
        rngs: nnx.Rngs | None,
        token_type_ids: ArrayLike | None = None,
        tokens: TokenEmbedding | None = None,
        cross: dict[str, Any] | None = None,
    ) -> Output:
        """Reads the tokens; `cross` is what blocks with cross-attention are given beside."""
        input_ids = self._check_ids(input_ids, caches)
        is_alone = caches is None or isinstance(caches[0], EmptyCache)  # these tokens attend each other only
        real = None if padding_mask is None else self._real_tokens(padding_mask, input_ids.shape)
        if self.relative_bias is not None:
            score_mod = compose_score_mods(self.relative_bias.score_mod(), score_mod)
        if mask is not None and caches is not None and not isinstance(mask, jax.Array | np.ndarray):
            raise ValueError(
                f"{type(self).__name__}: with caches, mask must be a boolean array over all tokens so far; "
                f"got {type(mask).__name__}. Give it as self_mask, which is read at positions."
            )
        call_mask, mask, given = mask, self.self_mask, position_ids is not None
        if position_ids is not None:
            position_ids = check_positions(type(self).__name__, "position_ids", position_ids, *input_ids.shape)
            position_ids = position_ids if real is None else jnp.where(real, position_ids, -1)
        elif real is not None or caches is not None:
            position_ids = count_positions(input_ids.shape, real, None if is_alone else caches)
        has_places = given or real is not None or caches is not None  # which may be others than 0, 1, 2, ...
        if position_ids is not None and is_alone and has_places:  # what a cache holds is read at positions by attention
            batch, length = input_ids.shape
            if mask is not None:
                known = length if caches is None else None  # positions of a cache may be any
                mask.check(type(self).__name__, (batch, self.config.num_heads, known, known))
            keeps_order = not given and (mask is None or isinstance(mask, Causal))  # counting keeps that of the indices
            if not keeps_order:
                mask = at_positions(mask, position_ids, position_ids)
            elif caches is None:  # with a cache, attention hides the padding
                assert real is not None
                mask = padding(real) if mask is None else mask & padding(real)
            score_mod = None if score_mod is None else at_positions(score_mod, position_ids, position_ids)
        if caches is not None and not is_alone and mask is not None:  # the rows of a self_mask are positions
            bounds = [getattr(cache, "num_positions", None) for cache in caches]
            known = min((bound for bound in bounds if bound is not None), default=None)
            mask.check(type(self).__name__, (input_ids.shape[0], self.config.num_heads, known, known))
        if call_mask is not None:
            mask = as_mask(call_mask) if mask is None else mask & call_mask

        mode: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x = self.embed(input_ids, tokens=tokens, position_ids=position_ids, token_type_ids=token_type_ids, **mode)
        each: dict[str, Any] = {"cache": caches}
        options: dict[str, Any]
        if cross is None:
            options = {"mask": mask, "position_ids": position_ids}
        else:
            options = {"self_mask": mask, "position_ids_self": position_ids, "position_ids_cross_q": position_ids}
            options |= cross
            if isinstance(cross["encoder_output"], tuple):
                each["encoder_output"] = options.pop("encoder_output")
        out = self.stack.run(x, each=each, score_mod=score_mod, **options, **mode)
        with jax.named_scope("norm"):
            return out if self.norm is None else out._replace(hidden=self.norm(out.hidden))

    def _check_ids(self, input_ids: ArrayLike, caches: tuple[LayerCache, ...] | None) -> Array:
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"{type(self).__name__}: input_ids must be (batch, length); got shape {input_ids.shape}.")
        is_limited = caches is None and self.config.pos_emb_type != "relative"
        if is_limited and input_ids.shape[1] > self.config.max_len:
            raise ValueError(
                f"{type(self).__name__}: a sequence must not be longer than max_len={self.config.max_len}; "
                f"got {input_ids.shape[1]} tokens."
            )
        if caches is not None and len(caches) != self.config.num_layers:
            raise ValueError(
                f"{type(self).__name__}: layer_kv_caches must hold one cache a layer; "
                f"got {len(caches)} for num_layers={self.config.num_layers}."
            )
        if caches is not None and len({isinstance(cache, EmptyCache) for cache in caches}) > 1:
            raise ValueError(
                f"{type(self).__name__}: either every cache is an EmptyCache or none is; got a mixture. Read a prompt "
                "into all layers at once."
            )
        return input_ids

    def _real_tokens(self, padding_mask: ArrayLike, shape: tuple[int, ...]) -> Array:
        padding_mask = jnp.asarray(padding_mask)
        if padding_mask.dtype != jnp.bool_ or padding_mask.shape not in (shape, (shape[0], 1, 1, shape[1])):
            raise ValueError(
                f"{type(self).__name__}: padding_mask must be boolean, True for real tokens, of shape {shape} or "
                f"({shape[0]}, 1, 1, {shape[1]}); got shape={padding_mask.shape}, dtype={padding_mask.dtype}."
            )
        return padding_mask.reshape(shape)


class TransformerEncoder(_TokenTransformer):
    """A stack in which every token attends every other: embeddings, blocks and a last norm; returns hidden states.

    Called as `TransformerEncoder(rngs, config)` or with the fields of TransformerConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: who attends whom, by default everyone everyone. Nothing attends padding in any case.
        **fields: the fields of TransformerConfig.

    Raises:
        ValueError: a field that TransformerConfig lacks, or a value that it refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerEncoder
        >>> encoder = TransformerEncoder(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> encoder(jnp.zeros((1, 5), int)).shape
        (1, 5, 8)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        *,
        self_mask: Mask | MaskMod | None = None,
        **fields: Any,
    ):
        config = resolve_config(TransformerConfig, config, fields)
        super().__init__(rngs, config, EncoderBlock, self_mask, bidirectional=True)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        token_type_ids: Int[ArrayLike, "B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: tuple[LayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states of `input_ids`.

        Args:
            input_ids: (batch, T).
            mask: who attends whom in this call beside the model's own mask, by index whatever the positions are:
                `masks.documents(ids)` for packed rows. With caches it is a boolean array (batch, heads, T, tokens so
                far), whose column j is position j, with an EmptyCache index j.
            padding_mask: True for real tokens, (batch, T) or (batch, 1, 1, T); padding may stand left or right.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids: each token's index within its row's text, -1 for padding; by default counted from the
                padding mask and the caches. Masks and score mods are read at positions too.
            token_type_ids: (batch, T), below the config's num_token_types, by default 0.
            score_mod: applied to the attention scores of every layer.
            layer_kv_caches: one a layer; the tokens are appended to them and attend all of them, in both directions.
            rngs: randomness of the dropout, instead of the stored streams.

        Returns:
            (batch, T, d_model), or with caches the pair of it and the new caches. Rows of padding hold no meaning.

        Raises:
            ValueError: ids outside the vocabulary, a sequence longer than max_len, or arguments that do not fit.
        """
        out = self.run(
            input_ids,
            mask=mask,
            padding_mask=padding_mask,
            deterministic=deterministic,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            score_mod=score_mod,
            caches=layer_kv_caches,
            rngs=rngs,
        )
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        caches: tuple[LayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Output:
        """The call with its result in one form."""
        return self._run(
            input_ids,
            mask=mask,
            padding_mask=padding_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            score_mod=score_mod,
            caches=caches,
            deterministic=deterministic,
            rngs=rngs,
        )


class TransformerDecoder(_TokenTransformer):
    """A stack under a causal mask: embeddings, blocks and a last norm; returns hidden states.

    Called as `TransformerDecoder(rngs, config)` or with the fields of TransformerConfig as keywords. It is decoder-only
    unless `cross_attention`; then every block also attends the output of an encoder.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: who attends whom, by default `causal()`. Nothing attends padding in any case.
        cross_attention: whether blocks attend an encoder's output.
        encoder_features: width of the encoder's output, by default d_model.
        own_tokens: whether it has a table of token embeddings; else `run` is given one each time.
        **fields: the fields of TransformerConfig.

    Raises:
        ValueError: a field that TransformerConfig lacks, or a value that it refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerDecoder
        >>> decoder = TransformerDecoder(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> decoder(jnp.zeros((1, 5), int)).shape
        (1, 5, 8)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        *,
        self_mask: Mask | MaskMod | None = None,
        cross_attention: bool = False,
        encoder_features: int | None = None,
        own_tokens: bool = True,
        **fields: Any,
    ):
        config = resolve_config(TransformerConfig, config, fields)
        if config.num_token_types:
            raise ValueError(
                f"TransformerDecoder: token types are an encoder's; got num_token_types={config.num_token_types}. "
                "Leave it out."
            )
        make_block = partial(DecoderBlock, encoder_features=encoder_features) if cross_attention else EncoderBlock
        self.cross_attention = cross_attention
        self_mask = causal() if self_mask is None else self_mask
        super().__init__(rngs, config, make_block, self_mask, bidirectional=False, own_tokens=own_tokens)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        encoder_output: Float[Array, "B S De"] | tuple[KeysValues, ...] | None = None,
        cross_mask: Mask | MaskMod | ArrayLike | None = None,
        encoder_position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
        layer_kv_caches: tuple[LayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states of `input_ids`.

        Args:
            input_ids: (batch, T).
            mask: who attends whom in this call beside the model's own mask, by index whatever the positions are:
                `masks.documents(ids)` for packed rows. With caches it is a boolean array (batch, heads, T, tokens so
                far), whose column j is position j, with an EmptyCache index j.
            padding_mask: True for real tokens, (batch, T) or (batch, 1, 1, T); padding may stand left or right.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids: each token's index within its row's text, -1 for padding; by default counted from the
                padding mask and the caches. Masks and score mods are read at positions too.
            score_mod: applied to the self-attention scores of every layer.
            encoder_output: (batch, S, encoder_features), or `keys_values` of it; needed with cross_attention.
            cross_mask: which tokens attend which of the encoder's, by index; `masks.padding(real)` hides its padding.
            encoder_position_ids: positions of the encoder's output, for RoPE, by default 0 ... S - 1.
            layer_kv_caches: one a layer; the tokens are appended to them and attend all of them.
            rngs: randomness of the dropout, instead of the stored streams.

        Returns:
            (batch, T, d_model), or with caches the pair of it and the new caches. Rows of padding hold no meaning.

        Raises:
            ValueError: ids outside the vocabulary, a sequence longer than max_len, or arguments that do not fit.
        """
        out = self.run(
            input_ids,
            mask=mask,
            padding_mask=padding_mask,
            deterministic=deterministic,
            position_ids=position_ids,
            score_mod=score_mod,
            encoder_output=encoder_output,
            cross_mask=cross_mask,
            encoder_position_ids=encoder_position_ids,
            caches=layer_kv_caches,
            rngs=rngs,
        )
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        encoder_output: Array | tuple[KeysValues, ...] | None = None,
        cross_mask: Mask | MaskMod | ArrayLike | None = None,
        encoder_position_ids: ArrayLike | None = None,
        token_embedding: TokenEmbedding | None = None,
        caches: tuple[LayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Output:
        """The call with its result in one form; `token_embedding` is for a decoder without its own."""
        if (encoder_output is not None) != self.cross_attention:
            raise ValueError(
                "TransformerDecoder: encoder_output is needed with cross_attention, and only then; "
                f"got cross_attention={self.cross_attention}, encoder_output "
                f"{'given' if encoder_output is not None else 'missing'}."
            )
        if not self.cross_attention and (cross_mask is not None or encoder_position_ids is not None):
            raise ValueError(
                "TransformerDecoder: cross_mask and encoder_position_ids are for cross-attention; got one without. "
                "Make the decoder with cross_attention=True."
            )
        if isinstance(encoder_output, tuple | list):
            whole = len(encoder_output) == self.config.num_layers and all(
                isinstance(entry, KeysValues) for entry in encoder_output
            )
            if not whole or encoder_position_ids is not None:
                raise ValueError(
                    "TransformerDecoder: encoder_output must be an array, or what keys_values gave: one KeysValues a "
                    f"layer, rotated already; got a {type(encoder_output).__name__} of {len(encoder_output)} for "
                    f"num_layers={self.config.num_layers}, encoder_position_ids "
                    f"{'given' if encoder_position_ids is not None else 'not given'}."
                )
            encoder_output = tuple(encoder_output)
        cross = {
            "encoder_output": encoder_output,
            "cross_mask": cross_mask,
            "position_ids_cross_kv": encoder_position_ids,
        }
        return self._run(
            input_ids,
            mask=mask,
            padding_mask=padding_mask,
            position_ids=position_ids,
            score_mod=score_mod,
            caches=caches,
            deterministic=deterministic,
            rngs=rngs,
            tokens=token_embedding,
            cross=cross if self.cross_attention else None,
        )

    def keys_values(
        self,
        encoder_output: Float[Array, "B S De"],
        encoder_position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
    ) -> tuple[KeysValues, ...]:
        """What every layer's cross-attention makes of an encoder's output, to be computed once for many calls."""
        return tuple(
            block.cross_attention.keys_values(encoder_output, encoder_position_ids) for block in self.stack.layers()
        )


class TokenHead(nnx.Module):
    """float32 logits of hidden states: a projection of its own, or products with the token embeddings.

    Args:
        rngs: for the initial weights.
        config: `tie_embeddings` decides, `use_bias` may name "head", `logit_scale` scales, `logit_soft_cap` bounds.
    """

    def __init__(self, rngs: nnx.Rngs, config: TransformerConfig):
        tied = config.tie_embeddings
        self.projection = nnx.data(
            None if tied else Linear(rngs, config, config.d_model, config.vocab_size, bias="head", logits=True)
        )
        self.bias = nnx.data(None)
        if tied and config.has_bias("head"):
            self.bias = nnx.Param(jnp.zeros((config.vocab_size,), config.param_dtype))
        self.scale, self.soft_cap = config.logit_scale, config.logit_soft_cap

    @jax.named_scope("head")
    def __call__(self, hidden: Float[Array, "*L D"], tokens: TokenEmbedding) -> Float[Array, "*L V"]:
        """The logits; `tokens` holds the embeddings of the tokens that they are about."""
        logits = tokens.attend(hidden) if self.projection is None else self.projection(hidden)
        if self.bias is not None:
            logits = logits + self.bias[...].astype(logits.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


def count_positions(
    shape: tuple[int, ...], real: Array | None, caches: tuple[LayerCache, ...] | None
) -> Int[Array, "B T"]:
    """Real tokens count on from what the caches hold; padding is at -1."""
    real = jnp.ones(shape, bool) if real is None else real
    start = 0 if caches is None else caches[0].next_positions()[:, None]
    return jnp.where(real, start + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
