"""Transformer blocks: sublayers around a residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import LayerCache
from attnax.checks import check_options
from attnax.config import AttentionType, BlockConfig, resolve_config
from attnax.masks import And, AtPositions, Dense, Documents, Lengths, Mask, as_mask
from attnax.nn._run import Mode, SelfAttentionOptions, run_of, runs, select_options
from attnax.nn.attention import KeysValues, MultiHeadAttention
from attnax.nn.dropout import Dropout
from attnax.nn.feedforward import FeedForward
from attnax.nn.moe import MixtureOfExperts
from attnax.nn.norms import norm_of
from attnax.nn.probe import Probed
from attnax.typing import Array, ArrayLike, AttentionFn, Float, Int, MaskMod, ScoreMod

__all__ = ["DecoderBlock", "EncoderBlock", "Output", "Residual", "add_aux"]


class Output(NamedTuple):
    """The results of a block, a stack or a model.

    Attributes:
        hidden: (batch, T, d_model); for a model, the input of its head.
        caches: the new cache of a block, the new caches of a stack, one a layer, or None.
        aux: losses and statistics by name, summed over the layers. `attnax.training.Trainer` adds every scalar whose
            name ends in "_loss" to the loss; a block of a user scales its own. Mixtures of experts have scalars, and
            `expert_load`, a tuple with one array for each mixture. Only real tokens count. Padding is a token at a
            negative position, or a token that the call's mask hides from all queries by `masks.padding`, an array or
            positions. Other masks and functions do not mark padding.
        logits: float32 (batch, T, vocab_size) or (batch, num_classes) of a model with a head, or None.
        carry: of a block, the new carry, and None where it stays as it was; of a stack or a model, the last one. See
            `Stack`.
        probed: what a `Probe` asked for, or None.
    """

    hidden: Array
    caches: Any
    aux: dict[str, Any]
    logits: Any = None
    carry: Any = None
    probed: Probed | None = None


def add_aux(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """The entries of both dictionaries; entries under one name are summed, tuples joined."""
    return left | {name: left[name] + value if name in left else value for name, value in right.items()}


class Residual(nnx.Module):
    """The residual connection around a sublayer f, with its norms.

    Args:
        rngs: for the norms and the stored dropout stream.
        config: `norm_placement` chooses "pre" x + f(norm(x)), "post" norm(x + f(x)), "sandwich" x + norm(f(norm(x)))
            or "branch" x + norm(f(x)). The added branch is scaled by one learned number for each feature
            (`layer_scale`), goes through dropout and is scaled by `residual_scale`.

    References:
        H. Touvron et al., "Going Deeper with Image Transformers" (LayerScale), 2021, https://arxiv.org/abs/2103.17239.
    """

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig):
        placement = config.norm_placement
        self.norm_in = nnx.data(norm_of(config, rngs) if placement in ("pre", "sandwich") else None)
        self.norm_branch = nnx.data(norm_of(config, rngs) if placement in ("sandwich", "branch") else None)
        self.norm_sum = nnx.data(norm_of(config, rngs) if placement == "post" else None)
        self.layer_scale = nnx.data(None)
        if config.layer_scale is not None:
            self.layer_scale = nnx.Param(jnp.full((config.d_model,), config.layer_scale, config.param_dtype))
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.scale = config.residual_scale

    def branch(
        self, x: Float[Array, "B T D"], sublayer: Callable[[Array], tuple[Array, Any]], **mode: Unpack[Mode]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The branch that `sublayer` adds to x, and the second result of `sublayer`."""
        branch, extra = sublayer(_normalised(self.norm_in, x))
        branch = _normalised(self.norm_branch, branch)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale[...].astype(branch.dtype)[None, None]
        branch = self.scale * self.dropout(branch, **mode)
        return branch.astype(x.dtype), extra  # the stream keeps its dtype

    def __call__(
        self, x: Float[Array, "B T D"], sublayer: Callable[[Array], tuple[Array, Any]], **mode: Unpack[Mode]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The new stream, and the second result of `sublayer`."""
        branch, extra = self.branch(x, sublayer, **mode)
        x = x + branch
        return _normalised(self.norm_sum, x).astype(x.dtype), extra


class EncoderBlockOptions(SelfAttentionOptions, total=False):
    """The options of `EncoderBlock`; in `__call__`, `cache` is `self_attn_kv_cache`."""

    mask: Mask | MaskMod | ArrayLike | None
    position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None
    cache: LayerCache | None
    mix_values: Callable[[Array], Array] | None


class EncoderBlock(nnx.Module):
    """Self-attention, then a feed-forward; under a causal mask, the block of a decoder-only model.

    Called as `EncoderBlock(rngs, config)`, `EncoderBlock(rngs, d_model=512, num_heads=8, d_ff=2048, ...)` or
    `EncoderBlock(rngs, 512, 8, 2048, ...)`. By default no mask is applied: pass `mask=causal()` where tokens must not
    see later tokens.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a BlockConfig, or d_model.
        num_heads: the field of BlockConfig, if config is d_model.
        d_ff: the field of BlockConfig, if config is d_model.
        attention_fn: as in `MultiHeadAttention`.
        score_mod: as in `MultiHeadAttention`.
        attention: the self-attention in place of a MultiHeadAttention of the config, for example one with hooks. Any
            nnx.Module will do whose `run(x, **options)` takes the options of `MultiHeadAttention.run` and returns
            (result, new cache or None).
        **fields: fields of BlockConfig; an unknown field or a value out of range raises ValueError.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import EncoderBlock, masks
        >>> block = EncoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=20)
        >>> block(jnp.zeros((1, 5, 12)), mask=masks.causal()).shape
        (1, 5, 12)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: BlockConfig | int | None = None,
        num_heads: int | None = None,
        d_ff: int | None = None,
        *,
        attention_fn: AttentionFn | None = None,
        score_mod: ScoreMod | None = None,
        attention: nnx.Module | None = None,
        **fields: Any,
    ):
        config = _block_config(config, num_heads, d_ff, fields)
        self.attention = _self_attention("EncoderBlock", rngs, config, attention, attention_fn, score_mod)
        self.around_attention = Residual(rngs, config)
        self.feed_forward = _make_feed_forward(rngs, config)
        self.around_feed_forward = Residual(rngs, config)
        self.parallel = config.parallel_residual

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        self_attn_kv_cache: LayerCache | None = None,
        mix_values: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Any]:
        """The stream after both sublayers; with a cache, the pair (stream, new cache).

        Arguments and errors are as in `MultiHeadAttention`.
        """
        options: EncoderBlockOptions = {"mask": mask, "position_ids": position_ids, "score_mod": score_mod}
        options |= {"cache": self_attn_kv_cache, "mix_values": mix_values}
        options |= {"deterministic": deterministic, "rngs": rngs}
        out = self.run(x, **options)
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self, x: Float[Array, "B T D"], *, attention_weights: bool = False, **options: Unpack[EncoderBlockOptions]
    ) -> Output:
        """The call; it always returns an Output, with `attention_weights` in `probed`, (batch, num_heads, T, T)."""
        _check_options("EncoderBlock", options, EncoderBlockOptions)
        mode, probed = select_options(options, Mode), None

        def attend(x: Array) -> tuple[Array, Any]:
            nonlocal probed
            if attention_weights:
                own = {"mask": options.get("mask"), "score_mod": options.get("score_mod")}
                probed = Probed(attention_weights=_weigh(self.attention, x, options.get("position_ids"), own))
            return run_of(self.attention)(
                x,
                mask=options.get("mask"),
                position_ids_q=options.get("position_ids"),
                kv_cache=options.get("cache"),
                **_mixing(options),
                **select_options(options, SelfAttentionOptions),
            )

        feed_forward = _as_sublayer(
            self.feed_forward, options.get("mask"), options.get("position_ids"), options.get("cache"), mode
        )
        if self.parallel:
            attended, new_cache = self.around_attention.branch(x, attend, **mode)
            fed, aux = self.around_feed_forward.branch(x, feed_forward, **mode)
            return Output(x + attended + fed, new_cache, aux, probed=probed)
        x, new_cache = self.around_attention(x, attend, **mode)
        x, aux = self.around_feed_forward(x, feed_forward, **mode)
        return Output(x, new_cache, aux, probed=probed)


class DecoderBlockOptions(SelfAttentionOptions, total=False):
    """The options of `DecoderBlock`, which `__call__` describes; in `__call__`, `cache` is `self_attn_kv_cache`."""

    self_mask: Mask | MaskMod | ArrayLike | None
    cross_mask: Mask | MaskMod | ArrayLike | None
    position_ids_self: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None
    position_ids_cross_q: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None
    position_ids_cross_kv: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None
    cache: LayerCache | None
    mix_values: Callable[[Array], Array] | None


class DecoderBlock(nnx.Module):
    """Self-attention, cross-attention to an encoder's output, then a feed-forward.

    Called as `DecoderBlock(rngs, config)` or `DecoderBlock(rngs, d_model=512, num_heads=8, d_ff=2048, ...)`. By
    default no mask is applied: pass `self_mask=causal()` where tokens must not see later tokens.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a BlockConfig, or d_model. Windows, ALiBi and lite attention are for self-attention only; with lite
            attention, cross-attention is FLASH.
        num_heads: the field of BlockConfig, if config is d_model.
        d_ff: the field of BlockConfig, if config is d_model.
        encoder_features: width of the encoder's output, by default d_model.
        attention_fn: of self-attention, as in `MultiHeadAttention`.
        score_mod: of self-attention, as in `MultiHeadAttention`.
        attention: of self-attention, as in `EncoderBlock`.
        **fields: fields of BlockConfig; an unknown field or a value out of range raises ValueError.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import DecoderBlock, masks
        >>> block = DecoderBlock(nnx.Rngs(0), d_model=12, num_heads=3, d_ff=20)
        >>> block(jnp.zeros((1, 5, 12)), encoder_output=jnp.zeros((1, 7, 12)), self_mask=masks.causal()).shape
        (1, 5, 12)
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: BlockConfig | int | None = None,
        num_heads: int | None = None,
        d_ff: int | None = None,
        *,
        encoder_features: int | None = None,
        attention_fn: AttentionFn | None = None,
        score_mod: ScoreMod | None = None,
        attention: nnx.Module | None = None,
        **fields: Any,
    ):
        config = _block_config(config, num_heads, d_ff, fields)
        if config.parallel_residual:
            raise ValueError(
                "DecoderBlock: cross-attention reads the result of self-attention; got parallel_residual=True. "
                "Leave it out."
            )
        cross = config
        if config.attention_type == AttentionType.LITE:
            cross = dataclasses.replace(config, attention_type=AttentionType.FLASH)
        self.attention = _self_attention("DecoderBlock", rngs, config, attention, attention_fn, score_mod)
        self.around_attention = Residual(rngs, config)
        self.cross_attention = MultiHeadAttention(rngs, cross, context_features=encoder_features)
        self.around_cross_attention = Residual(rngs, config)
        self.feed_forward = _make_feed_forward(rngs, config)
        self.around_feed_forward = Residual(rngs, config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        encoder_output: Float[Array, "B S De"] | KeysValues,
        self_mask: Mask | MaskMod | ArrayLike | None = None,
        cross_mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids_self: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        position_ids_cross_q: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        position_ids_cross_kv: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
        score_mod: ScoreMod | None = None,
        self_attn_kv_cache: LayerCache | None = None,
        mix_values: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Any]:
        """The stream after the three sublayers; with a cache, the pair (stream, new cache).

        Arguments and errors are as in `MultiHeadAttention`. `self_mask`, `position_ids_self`, `score_mod`, `mix_values`
        and `self_attn_kv_cache` are for self-attention. Cross-attention has:

        - `encoder_output`: (batch, S, encoder_features), or its `keys_values` from this block's cross_attention.
        - `cross_mask`: mask of the tokens of x against the tokens of the encoder, read at indices.
        - `position_ids_cross_q`: positions of x for RoPE, by default `position_ids_self`.
        - `position_ids_cross_kv`: positions of the encoder's output for RoPE.
        """
        options: DecoderBlockOptions = {"self_mask": self_mask, "cross_mask": cross_mask, "score_mod": score_mod}
        options |= {"position_ids_self": position_ids_self, "position_ids_cross_q": position_ids_cross_q}
        options |= {"position_ids_cross_kv": position_ids_cross_kv, "cache": self_attn_kv_cache}
        options |= {"mix_values": mix_values, "deterministic": deterministic, "rngs": rngs}
        out = self.run(x, encoder_output=encoder_output, **options)
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        encoder_output: Float[Array, "B S De"] | KeysValues,
        attention_weights: bool = False,
        **options: Unpack[DecoderBlockOptions],
    ) -> Output:
        """The call; it always returns an Output, with the `attention_weights` of both attentions in `probed`."""
        _check_options("DecoderBlock", options, DecoderBlockOptions)
        mode, cache, positions = select_options(options, Mode), options.get("cache"), options.get("position_ids_self")
        if positions is None and cache is not None:
            positions = cache.next_positions()[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        cross_positions, weights = options.get("position_ids_cross_q"), Probed()

        def attend(x: Array) -> tuple[Array, Any]:
            nonlocal weights
            if attention_weights:
                own = {"mask": options.get("self_mask"), "score_mod": options.get("score_mod")}
                weights = weights._replace(attention_weights=_weigh(self.attention, x, positions, own))
            return run_of(self.attention)(
                x,
                mask=options.get("self_mask"),
                position_ids_q=positions,
                kv_cache=cache,
                **_mixing(options),
                **select_options(options, SelfAttentionOptions),
            )

        @jax.named_scope("cross")
        def attend_encoder(x: Array) -> tuple[Array, None]:
            nonlocal weights
            own = {"context": encoder_output, "mask": options.get("cross_mask")}
            own |= {"position_ids_kv": options.get("position_ids_cross_kv")}
            positions_q = positions if cross_positions is None else cross_positions
            if attention_weights:
                cross = _weigh(self.cross_attention, x, positions_q, own)
                weights = weights._replace(cross_attention_weights=cross)
            return run_of(self.cross_attention)(x, position_ids_q=positions_q, **own, **mode)[0], None

        feed_forward = _as_sublayer(self.feed_forward, options.get("self_mask"), positions, cache, mode)
        x, new_cache = self.around_attention(x, attend, **mode)
        x, _ = self.around_cross_attention(x, attend_encoder, **mode)
        x, aux = self.around_feed_forward(x, feed_forward, **mode)
        return Output(x, new_cache, aux, probed=weights if attention_weights else None)


# Arguments of MultiHeadAttention that no config has.
_ATTENTION_ARGUMENTS = ("rope", "query_norm", "key_norm", "query_fn", "key_fn", "value_fn", "token_scalars")


def _check_options(caller: str, options: Mapping[str, Any], kind: type) -> None:
    """`check_options`, and ValueError for a carry that a class of a user hands on."""
    if "carry" in options:
        raise ValueError(
            f"{caller}: a class with init_carry keeps the carry to itself; got carry among the options of "
            f"{caller}.run. Write run(self, x, *, carry, **options), and super().run(x, **options)."
        )
    check_options(caller, options, kind)


def _block_config(
    config: BlockConfig | int | None, num_heads: int | None, d_ff: int | None, fields: dict[str, Any]
) -> BlockConfig:
    """The config of a block, whose sizes may be positional arguments."""
    if hooks := [name for name in fields if name in _ATTENTION_ARGUMENTS]:
        raise ValueError(
            f"a block takes the arguments of its attention in attention=MultiHeadAttention(rngs, config, "
            f"{hooks[0]}=...); got {', '.join(hooks)}."
        )
    sizes = {"num_heads": num_heads, "d_ff": d_ff}
    if isinstance(config, int | np.integer):
        if "d_model" in fields:
            raise ValueError(
                f"BlockConfig: d_model must be given once; got {config} by position and d_model={fields['d_model']}."
            )
        sizes["d_model"], config = config, None
    given = {name: size for name, size in sizes.items() if size is not None}
    return resolve_config(BlockConfig, config, fields | given)


def _weigh(attention: Any, x: Array, position_ids: Any, options: dict[str, Any]) -> Array:
    """The weights of an attention, for a `Probe`.

    Raises:
        ValueError: a class of a user whose run is its own and whose attention_weights would not be those of run.
    """
    kind = type(attention)
    own = getattr(kind, "attention_weights", None)
    if own is None or (own is MultiHeadAttention.attention_weights and not runs(attention, MultiHeadAttention.run)):
        raise ValueError(
            "Probe: attention_weights are those of MultiHeadAttention.attention_weights; got "
            f"{kind.__module__}.{kind.__qualname__} with a run of its own. Define attention_weights in it too."
        )
    weights: Array = attention.attention_weights(x, position_ids_q=position_ids, **options)
    return weights


def _self_attention(
    caller: str,
    rngs: nnx.Rngs,
    config: BlockConfig,
    attention: nnx.Module | None,
    attention_fn: AttentionFn | None,
    score_mod: ScoreMod | None,
) -> nnx.Module:
    """The given module, or the MultiHeadAttention of the config."""
    if attention is None:
        return MultiHeadAttention(rngs, config, attention_fn=attention_fn, score_mod=score_mod)
    if attention_fn is not None or score_mod is not None:
        raise ValueError(
            f"{caller}: attention has a function and a score mod of its own; got it with "
            f"{'score_mod' if attention_fn is None else 'attention_fn'}. Give it to "
            f"MultiHeadAttention(rngs, config, ...) in attention."
        )
    if not isinstance(attention, nnx.Module) or not callable(getattr(attention, "run", None)):
        raise ValueError(
            f"{caller}: attention must be an nnx.Module with run(x, **options) -> (result, new cache or None), such as "
            f"a MultiHeadAttention; got {type(attention).__name__}."
        )
    return attention


def _mixing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The option mix_values, if it is given: an attention of a user need not have it."""
    mix_values = options.get("mix_values")
    return {} if mix_values is None else {"mix_values": mix_values}


@jax.named_scope("norm")
def _normalised(norm: Any, x: Array) -> Array:
    return x if norm is None else norm(x)


def _make_feed_forward(rngs: nnx.Rngs, config: BlockConfig) -> FeedForward | MixtureOfExperts:
    return FeedForward(rngs, config) if config.num_experts is None else MixtureOfExperts(rngs, config)


def _as_sublayer(
    layer: Any, mask: Any, positions: ArrayLike | None, cache: Any, mode: dict[str, Any]
) -> Callable[[Array], tuple[Array, dict[str, Any]]]:
    """A feed-forward as `x -> (out, aux)`; a mixture of experts also gets the padding mask."""

    def feed_forward(x: Array) -> tuple[Array, dict[str, Any]]:
        if not isinstance(layer, MixtureOfExperts):
            return layer(x, **mode), {}
        out, aux = layer(x, padding_mask=_real_tokens(x, mask, positions, cache), **mode)
        return out, aux | {"expert_load": (aux["expert_load"],)}  # loads of two mixtures are not summed

    return feed_forward


def _real_tokens(x: Array, mask: Any, positions: ArrayLike | None, cache: Any) -> Array | None:
    """True for the tokens of x that are real by positions and mask, (batch, T); None where neither marks padding."""
    real = None if positions is None else jnp.atleast_2d(jnp.asarray(positions)) >= 0
    # With a cache that may hold tokens, the columns of the mask are positions, not tokens of x.
    if mask is not None and (cache is None or cache.is_empty):
        real = _both(real, _attended_keys(as_mask(mask), jnp.arange(x.shape[1])[None, :]))
    return None if real is None else jnp.broadcast_to(real, x.shape[:2])


def _attended_keys(mask: Mask, keys: Array, *, at_positions: bool = False) -> Array | None:
    """True for keys that some query may attend, (1 or batch, 1 or T); None where the answer needs all pairs."""
    match mask:
        case And(left, right):
            return _both(*(_attended_keys(side, keys, at_positions=at_positions) for side in (left, right)))
        case AtPositions(inner, _, positions) if not at_positions:
            return _both(positions >= 0, None if inner is None else _attended_keys(inner, positions, at_positions=True))
        case Lengths(lengths):
            return keys < lengths[:, None]
        case Documents(_, ids):
            return None if at_positions else ids >= 0
        case Dense(array):
            by_index = array.any((1, 2))
            rows = jnp.arange(array.shape[0])[:, None]
            return Dense(by_index[:, None, None, :])(rows, 0, 0, keys) if at_positions else by_index
    return None


def _both(left: Array | None, right: Array | None) -> Array | None:
    return right if left is None else left if right is None else left & right
