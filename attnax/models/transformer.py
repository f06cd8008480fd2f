"""Stacks of blocks over token embeddings: the encoder and the decoder, and the head that gives logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import LayerCache, cache_kinds
from attnax.checks import check_options, check_positions
from attnax.config import TransformerConfig, resolve_config
from attnax.kernels.score_mods import compose_score_mods
from attnax.masks import Causal, Mask, as_mask, at_positions, causal, over_text, padding
from attnax.nn._parts import MakeBlock, block_maker
from attnax.nn._run import Mode, SelfAttentionOptions, select_options
from attnax.nn.attention import KeysValues
from attnax.nn.blocks import DecoderBlock, EncoderBlock, Output
from attnax.nn.embeddings import RelativePositionBias, TokenEmbedding, TransformerEmbedding
from attnax.nn.linear import Linear
from attnax.nn.norms import norm_of
from attnax.nn.probe import Probe
from attnax.nn.stack import Stack
from attnax.typing import Array, ArrayLike, AttentionFn, Bool, Float, Int, MaskMod, ScoreMod

__all__ = ["TokenHead", "TransformerDecoder", "TransformerEncoder", "count_positions"]


class TokenOptions(SelfAttentionOptions, total=False):
    """The options of `TransformerLM.log_probs`, a call without caches."""

    mask: Mask | MaskMod | ArrayLike | None
    self_mask: Mask | MaskMod | ArrayLike | None
    padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None
    position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None


class CachedOptions(TokenOptions, total=False):
    """The options of `TransformerLM`, encoder and decoder; in `__call__`, `caches` is `layer_kv_caches`."""

    caches: Sequence[LayerCache] | None


class EncoderOptions(CachedOptions, total=False):
    """The options of `TransformerEncoder`, which `__call__` describes."""

    token_type_ids: Int[ArrayLike, "B T"] | None


class DecoderOptions(CachedOptions, total=False):
    """The options of `TransformerDecoder`; `__call__` describes the last three."""

    encoder_output: Float[Array, "B S De"] | tuple[KeysValues, ...] | None
    cross_mask: Mask | MaskMod | ArrayLike | None
    encoder_position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None


class _TokenTransformer(nnx.Module):
    """Embeddings, blocks and a last norm, which the encoder and the decoder share."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig,
        make_block: MakeBlock,
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
        options: CachedOptions,
        *,
        token_type_ids: ArrayLike | None = None,
        tokens: TokenEmbedding | None = None,
        cross: dict[str, Any] | None = None,
        probe: Probe | None = None,
    ) -> Output:
        """The hidden states of token ids; `cross` holds the options of cross-attention, None for blocks without it."""
        ids, mode = jnp.asarray(input_ids), select_options(options, Mode)
        self._check(ids, options)
        position_ids, mask, score_mod = self._place(ids.shape, options)
        x = self.embed(ids, tokens=tokens, position_ids=position_ids, token_type_ids=token_type_ids, **mode)

        each: dict[str, Any] = {"cache": options.get("caches")}  # one entry a layer
        if cross is None:
            shared: dict[str, Any] = {"mask": mask, "position_ids": position_ids}
        else:
            shared = cross | {"self_mask": mask, "position_ids_self": position_ids}
            if isinstance(shared["encoder_output"], tuple | list):
                each["encoder_output"] = shared.pop("encoder_output")
        out = self.stack.run(x, each=each, input_ids=ids, probe=probe, score_mod=score_mod, **mode, **shared)
        with jax.named_scope("norm"):
            return out if self.norm is None else out._replace(hidden=self.norm(out.hidden))

    def _check(self, ids: Array, options: CachedOptions) -> None:
        """Raises ValueError for ids, caches or a mask of the call that do not fit the model or each other."""
        name, caches, mask = type(self).__name__, options.get("caches"), options.get("mask")
        if ids.ndim != 2:
            raise ValueError(f"{name}: input_ids must be (batch, length); got shape {ids.shape}.")
        is_limited = caches is None and self.config.pos_emb_type != "relative"
        if is_limited and ids.shape[1] > self.config.max_len:
            raise ValueError(
                f"{name}: a sequence must not be longer than max_len={self.config.max_len}; got {ids.shape[1]} tokens."
            )
        if caches is None:
            return
        if len(caches) != self.config.num_layers:
            raise ValueError(
                f"{name}: layer_kv_caches must hold one cache a layer; "
                f"got {len(caches)} for num_layers={self.config.num_layers}."
            )
        if len({cache.is_empty for cache in cache_kinds(caches)}) > 1:
            raise ValueError(
                f"{name}: either every cache is an EmptyCache or none is; got a mixture. Read a prompt "
                "into all layers at once."
            )
        if mask is not None and not isinstance(mask, jax.Array | np.ndarray):
            raise ValueError(
                f"{name}: with caches, mask must be a boolean array over all tokens so far; "
                f"got {type(mask).__name__}. Give it as self_mask, which is read at positions."
            )

    def _place(
        self, shape: tuple[int, ...], options: CachedOptions
    ) -> tuple[Array | None, Mask | None, ScoreMod | None]:
        """The positions of the tokens (None for 0, 1, 2, ...), and the mask and the score mod of all layers.

        The `self_mask` (of the call, else the model's own) and the score mods are read at positions, the `mask` of the
        call at indices. With a cache that holds tokens, attention reads everything at positions; for other calls this
        function converts masks and mods to indices.
        """
        name, caches, (batch, length) = type(self).__name__, options.get("caches"), shape
        is_alone = caches is None or caches[0].is_empty  # the tokens attend each other only
        padding_mask, given, position_ids = options.get("padding_mask"), options.get("position_ids"), None
        real = None if padding_mask is None else self._real_tokens(padding_mask, shape)
        if given is not None:
            position_ids = check_positions(name, "position_ids", given, batch, length)
            position_ids = position_ids if real is None else jnp.where(real, position_ids, -1)
        elif real is not None or caches is not None:
            position_ids = count_positions(shape, real, None if is_alone else caches)

        mask, score_mod = self._self_mask(options), options.get("score_mod")
        if self.relative_bias is not None:
            score_mod = compose_score_mods(self.relative_bias.score_mod(), score_mod)
        if position_ids is not None and mask is not None:
            self._check_at_positions(mask, batch, length, caches)
            mask = mask if is_alone else over_text(mask)
        if position_ids is not None and is_alone:
            # Counted positions are in the order of the indices, so a causal mask is the same for both.
            if given is not None or not (mask is None or isinstance(mask, Causal)):
                mask = at_positions(mask, position_ids, position_ids)
            elif caches is None:  # with a cache, attention hides the padding
                assert real is not None
                mask = padding(real) if mask is None else mask & padding(real)
            score_mod = None if score_mod is None else at_positions(score_mod, position_ids, position_ids)
        if (call_mask := options.get("mask")) is not None:
            mask = as_mask(call_mask) if mask is None else mask & call_mask
        return position_ids, mask, score_mod

    def _self_mask(self, options: CachedOptions) -> Mask | None:
        """The mask that is read at positions: of the call, else the model's own."""
        of_call = options.get("self_mask")
        return self.self_mask if of_call is None else as_mask(of_call)

    def _check_at_positions(self, mask: Mask, batch: int, length: int, caches: Sequence[LayerCache] | None) -> None:
        """Raises ValueError for arrays of other rows or heads, or of fewer positions than a text may have."""
        name, known = type(self).__name__, length if caches is None else None
        mask.check(name, (batch, self.config.num_heads, known, known))
        if caches is None or caches[0].is_empty:
            return
        bounds = [getattr(cache, "num_positions", None) for cache in cache_kinds(caches)]
        room, has = min((bound for bound in bounds if bound is not None), default=None), mask.num_positions
        if has is not None and room is not None and has < room:
            raise ValueError(
                f"{name}: arrays of self_mask must cover the positions that the caches have room for; "
                f"got {has} positions for caches of {room}. Make the arrays longer, or the caches shorter."
            )

    def _real_tokens(self, padding_mask: ArrayLike, shape: tuple[int, ...]) -> Array:
        padding_mask = jnp.asarray(padding_mask)
        if padding_mask.dtype != jnp.bool_ or padding_mask.shape not in (shape, (shape[0], 1, 1, shape[1])):
            raise ValueError(
                f"{type(self).__name__}: padding_mask must be boolean, True for real tokens, of shape {shape} or "
                f"({shape[0]}, 1, 1, {shape[1]}); got shape={padding_mask.shape}, dtype={padding_mask.dtype}."
            )
        return padding_mask.reshape(shape)


class TransformerEncoder(_TokenTransformer):
    """A stack whose tokens all attend each other: embeddings, blocks and a last norm; returns hidden states.

    Called as `TransformerEncoder(rngs, config)` or with the fields of TransformerConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: mask of self-attention, by default none. No token attends padding.
        make_block: `(rngs, config) -> block`, called once for each layer with its config, in place of the library's
            EncoderBlock. `attnax.nn.Stack` says what a block is, and docs/guides/own-blocks.md has examples.
        attention_fn: of self-attention in every layer, as in `MultiHeadAttention`; a function without arrays.
        **fields: fields of TransformerConfig; an unknown field or a value out of range raises ValueError.

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
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        config = resolve_config(TransformerConfig, config, fields)
        make_block = block_maker("TransformerEncoder", EncoderBlock, make_block, attention_fn)
        super().__init__(rngs, config, make_block, self_mask, bidirectional=True)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        token_type_ids: Int[ArrayLike, "B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: Sequence[LayerCache] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Sequence[Any]]:
        """Hidden states of `input_ids`.

        Args:
            input_ids: (batch, T).
            mask: of this call, beside the model's own mask; read at indices even if positions are given. An example is
                `masks.documents(ids)` for packed rows. With caches, a boolean array (batch, heads, T, tokens so far):
                column j is position j, or index j with an EmptyCache.
            self_mask: takes the place of the model's own mask in this call; read at positions as that is. Windows of
                layers (`attention_window`) stay.
            padding_mask: True for real tokens, (batch, T) or (batch, 1, 1, T); padding may stand left or right.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids: each token's index within its row's text, -1 for padding; by default counted from the
                padding mask and the caches. `self_mask` and score mods are read at positions.
            token_type_ids: (batch, T), below the config's num_token_types, by default 0.
            score_mod: applied to the attention scores of every layer.
            layer_kv_caches: one for each layer. Tokens are appended and attend all tokens in a cache, later tokens too.
            rngs: randomness of the dropout, instead of the stored streams.

        Returns:
            (batch, T, d_model); with caches, the pair (states, new caches). The states of padding have no meaning.

        Raises:
            ValueError: ids outside the vocabulary, a sequence longer than max_len, or arguments that do not fit.
        """
        options: EncoderOptions = {"mask": mask, "self_mask": self_mask, "padding_mask": padding_mask}
        options |= {"position_ids": position_ids, "token_type_ids": token_type_ids, "score_mod": score_mod}
        options |= {"caches": layer_kv_caches, "deterministic": deterministic, "rngs": rngs}
        out = self.run(input_ids, **options)
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self, input_ids: Int[ArrayLike, "B T"], *, probe: Probe | None = None, **options: Unpack[EncoderOptions]
    ) -> Output:
        """The call; it always returns an Output, with what a `probe` asks for in `probed`."""
        check_options("TransformerEncoder", options, EncoderOptions)
        return self._run(input_ids, options, token_type_ids=options.get("token_type_ids"), probe=probe)


class TransformerDecoder(_TokenTransformer):
    """A stack under a causal mask: embeddings, blocks and a last norm; returns hidden states.

    Called as `TransformerDecoder(rngs, config)` or with the fields of TransformerConfig as keywords. With
    `cross_attention` every block also attends the output of an encoder; without it the model is decoder-only.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: mask of self-attention, by default `causal()`. No token attends padding.
        cross_attention: whether blocks attend an encoder's output.
        encoder_features: width of the encoder's output, by default d_model.
        own_tokens: whether the model has a table of token embeddings; if not, every `run` takes a table.
        make_block: `(rngs, config) -> block`, called once for each layer with its config, in place of the library's
            EncoderBlock, or DecoderBlock with cross_attention. `attnax.nn.Stack` says what a block is, and
            docs/guides/own-blocks.md has examples.
        attention_fn: of self-attention in every layer, as in `MultiHeadAttention`; a function without arrays.
        **fields: fields of TransformerConfig; an unknown field or a value out of range raises ValueError.

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
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        config = resolve_config(TransformerConfig, config, fields)
        if config.num_token_types:
            raise ValueError(
                f"TransformerDecoder: token types are an encoder's; got num_token_types={config.num_token_types}. "
                "Leave it out."
            )
        default = partial(DecoderBlock, encoder_features=encoder_features) if cross_attention else EncoderBlock
        make_block = block_maker("TransformerDecoder", default, make_block, attention_fn)
        self.cross_attention = cross_attention
        self_mask = causal() if self_mask is None else self_mask
        super().__init__(rngs, config, make_block, self_mask, bidirectional=False, own_tokens=own_tokens)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        encoder_output: Float[Array, "B S De"] | tuple[KeysValues, ...] | None = None,
        cross_mask: Mask | MaskMod | ArrayLike | None = None,
        encoder_position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
        layer_kv_caches: Sequence[LayerCache] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Sequence[Any]]:
        """Hidden states of `input_ids`.

        Arguments, result and errors are as in `TransformerEncoder`; masks and `score_mod` are for self-attention.
        With cross_attention a call also takes:

        - `encoder_output`: (batch, S, encoder_features), or its `keys_values`; required.
        - `cross_mask`: mask against the encoder's tokens, read at indices; `masks.padding(real)` hides padding.
        - `encoder_position_ids`: positions of the encoder's output, for RoPE, by default 0 ... S - 1.
        """
        options: DecoderOptions = {"mask": mask, "self_mask": self_mask, "padding_mask": padding_mask}
        options |= {"position_ids": position_ids}
        options |= {"encoder_output": encoder_output, "cross_mask": cross_mask, "score_mod": score_mod}
        options |= {"encoder_position_ids": encoder_position_ids, "caches": layer_kv_caches}
        options |= {"deterministic": deterministic, "rngs": rngs}
        out = self.run(input_ids, **options)
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        token_embedding: TokenEmbedding | None = None,
        probe: Probe | None = None,
        **options: Unpack[DecoderOptions],
    ) -> Output:
        """The call; it always returns an Output, with what a `probe` asks for in `probed`.

        A decoder without own_tokens needs `token_embedding`.
        """
        check_options("TransformerDecoder", options, DecoderOptions)
        self._check_cross(options)
        cross = {
            "encoder_output": options.get("encoder_output"),
            "cross_mask": options.get("cross_mask"),
            "position_ids_cross_kv": options.get("encoder_position_ids"),
        }
        cross_options = cross if self.cross_attention else None
        return self._run(input_ids, options, tokens=token_embedding, cross=cross_options, probe=probe)

    def _check_cross(self, options: DecoderOptions) -> None:
        """Raises ValueError for options of cross-attention that do not fit the model or each other."""
        encoder_output, position_ids = options.get("encoder_output"), options.get("encoder_position_ids")
        if (encoder_output is not None) != self.cross_attention:
            raise ValueError(
                "TransformerDecoder: encoder_output is needed with cross_attention, and only then; "
                f"got cross_attention={self.cross_attention}, encoder_output "
                f"{'given' if encoder_output is not None else 'missing'}."
            )
        if not self.cross_attention and (options.get("cross_mask") is not None or position_ids is not None):
            raise ValueError(
                "TransformerDecoder: cross_mask and encoder_position_ids are for cross-attention; got one without. "
                "Make the decoder with cross_attention=True."
            )
        if not isinstance(encoder_output, tuple | list):
            return
        is_whole = len(encoder_output) == self.config.num_layers
        if not is_whole or position_ids is not None or not all(isinstance(x, KeysValues) for x in encoder_output):
            raise ValueError(
                "TransformerDecoder: encoder_output must be an array, or the result of keys_values: one KeysValues a "
                f"layer, rotated already; got a {type(encoder_output).__name__} of {len(encoder_output)} for "
                f"num_layers={self.config.num_layers}, encoder_position_ids "
                f"{'given' if position_ids is not None else 'not given'}."
            )

    def keys_values(
        self,
        encoder_output: Float[Array, "B S De"],
        encoder_position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
    ) -> tuple[KeysValues, ...]:
        """The keys and values of an encoder's output for every layer, computed once for many calls.

        Raises:
            ValueError: a block of a user without `cross_attention`, whose `keys_values` these are.
        """
        blocks = self.stack.layers()
        for block in blocks:
            if not hasattr(getattr(block, "cross_attention", None), "keys_values"):
                raise ValueError(
                    "TransformerDecoder: keys_values, which generate calls, are those of the cross_attention of each "
                    f"block, a MultiHeadAttention; got {type(block).__name__} without it. Give it that name."
                )
        return tuple(block.cross_attention.keys_values(encoder_output, encoder_position_ids) for block in blocks)


class TokenHead(nnx.Module):
    """float32 logits of hidden states, by a projection of its own or by products with the token embeddings.

    Args:
        rngs: for the initial weights.
        config: `tie_embeddings` chooses between the two, `use_bias` may name "head"; `logit_scale` multiplies the
            logits, `logit_soft_cap` bounds them.
    """

    def __init__(self, rngs: nnx.Rngs, config: TransformerConfig):
        tied = config.tie_embeddings
        self.projection = nnx.data(
            None
            if tied
            else Linear(
                rngs, config, config.d_model, config.vocab_size, bias="head", axes=("embed", "vocab"), logits=True
            )
        )
        self.bias = nnx.data(None)
        if tied and config.has_bias("head"):
            self.bias = nnx.Param(jnp.zeros((config.vocab_size,), config.param_dtype))
        self.scale, self.soft_cap = config.logit_scale, config.logit_soft_cap

    @jax.named_scope("head")
    def __call__(self, hidden: Float[Array, "*L D"], tokens: TokenEmbedding | None) -> Float[Array, "*L V"]:
        """The logits; `tokens` holds the embeddings of the predicted tokens, which a projection does not need."""
        if self.projection is not None:
            logits = self.projection(hidden)
        elif tokens is not None:
            logits = tokens.attend(hidden)
        else:
            raise ValueError("TokenHead: a head without a projection needs `tokens`, the embeddings of the tokens.")
        if self.bias is not None:
            logits = logits + self.bias[...].astype(logits.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


def count_positions(
    shape: tuple[int, ...], real: Array | None, caches: Sequence[LayerCache] | None
) -> Int[Array, "B T"]:
    """Positions of real tokens, counted on from the tokens in the caches; padding is at -1."""
    real = jnp.ones(shape, bool) if real is None else real
    start = 0 if caches is None else caches[0].next_positions()[:, None]
    return jnp.where(real, start + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
