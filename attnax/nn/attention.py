"""Multi-head attention as a layer: projections, rotary positions, dropout and cache around any `AttentionFn`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.cache import KVLayerCache, update_kv_layer_cache
from attnax.config import BlockConfig, resolve_config
from attnax.kernels.flash import flash_attention
from attnax.kernels.score_mods import compose_score_mods
from attnax.masks import Mask, as_mask, at_positions, mask_argument
from attnax.nn.dropout import Dropout
from attnax.nn.linear import Linear
from attnax.nn.rope import RotaryEmbedding
from attnax.typing import Array, ArrayLike, AttentionFn, Float, Int, MaskMod, ScoreMod, check_positions

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nnx.Module):
    """Grouped multi-head attention, of x to itself or to a context.

    Called as `MultiHeadAttention(rngs, config)` or with keywords.

    Args:
        rngs: for the initial weights and the stored dropout stream.
        config: a BlockConfig.
        in_features: width of x and of the context (the config's d_model).
        qkv_features: width of all query heads together, by default in_features.
        out_features: width of the result, by default in_features.
        attention_fn: what computes the attention of the projected, rotated heads.
        score_mod: applied to the scores of every call, before a per-call one. One that holds arrays must be a
            callable pytree or an nnx.Module, so that the arrays are part of the layer's state.
        **fields: other fields of BlockConfig (num_heads, num_kv_heads, dropout_rate, ...), and `use_rope`.

    Raises:
        ValueError: options that do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import MultiHeadAttention, masks
        >>> attn = MultiHeadAttention(nnx.Rngs(0), num_heads=8, in_features=64, num_kv_heads=2, use_rope=True)
        >>> attn(jnp.zeros((1, 5, 64)), mask=masks.causal()).shape
        (1, 5, 64)

    References:
        J. Ainslie et al., "GQA", 2023, https://arxiv.org/abs/2305.13245.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: BlockConfig | None = None,
        /,
        *,
        in_features: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        attention_fn: AttentionFn = flash_attention,
        score_mod: ScoreMod | None = None,
        **fields: Any,
    ):
        if in_features is not None:
            fields["d_model"] = in_features
        if qkv_features is not None:
            num_heads = fields.get("num_heads", BlockConfig.num_heads)
            if num_heads < 1 or qkv_features % num_heads:
                raise ValueError(
                    "MultiHeadAttention: qkv_features must be a multiple of num_heads; "
                    f"got qkv_features={qkv_features}, num_heads={num_heads}."
                )
            fields["head_dim"] = qkv_features // num_heads
        config = resolve_config(BlockConfig, config, fields)
        linear = partial(
            Linear, use_bias=config.use_bias, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_size
        self.query = linear(config.d_model, self.num_heads * self.head_dim)
        self.key = linear(config.d_model, self.num_kv_heads * self.head_dim)
        self.value = linear(config.d_model, self.num_kv_heads * self.head_dim)
        self.out = linear(
            self.num_heads * self.head_dim,
            config.d_model if out_features is None else out_features,
            scale=config.residual_scale,
        )
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.rope = None
        if config.pos_emb_type == "rope":
            self.rope = RotaryEmbedding(self.head_dim, config.rope_max_positions, base=config.rope_base)
        self.attention_fn = attention_fn
        plain = jax.tree_util.all_leaves([score_mod])
        self.score_mod = score_mod if plain else nnx.data(score_mod)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S D"] | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids_q: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
        position_ids_kv: Int[ArrayLike, S] | Int[ArrayLike, "#B S"] | None = None,
        score_mod: ScoreMod | None = None,
        kv_cache: KVLayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T Do"] | tuple[Float[Array, "B T Do"], KVLayerCache]:
        """What each token of x gathers from the tokens of `context`, or of x itself.

        Args:
            x: (batch, T, in_features).
            context: (batch, S, in_features) for cross-attention; by default x.
            mask: True to attend; a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array that broadcasts to
                (batch, num_heads, T, S), with a cache to (batch, num_heads, max_len, max_len).
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids_q: positions of x, (T,) or (batch, T), for RoPE and for the cache, by default 0 ... T - 1, or
                what follows the cache, where -1 marks padding. Without a cache, masks and score mods are read at
                indices; `attnax.masks.at_positions` reads them at positions.
            position_ids_kv: positions of the context for RoPE, by default 0 ... S - 1.
            score_mod: applied to the scores after the layer's own.
            kv_cache: x is appended to it and attends all of it. Masks and score mods are then read at positions.
            rngs: randomness of the dropout, instead of the stored stream.

        Returns:
            (batch, T, out_features), or with a cache the pair of it and the new cache.

        Raises:
            ValueError: arguments that do not fit together, or a full cache (under jit: NaN).
        """
        out, cache = self.run(
            x,
            context=context,
            mask=mask,
            deterministic=deterministic,
            position_ids_q=position_ids_q,
            position_ids_kv=position_ids_kv,
            score_mod=score_mod,
            kv_cache=kv_cache,
            rngs=rngs,
        )
        return out if cache is None else (out, cache)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S D"] | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids_q: ArrayLike | None = None,
        position_ids_kv: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        kv_cache: KVLayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T Do"], KVLayerCache | None]:
        """The call with its result in one form: (out, new cache or None)."""
        if kv_cache is not None and (context is not None or position_ids_kv is not None):
            raise ValueError(
                "MultiHeadAttention: kv_cache is for self-attention, whose keys are x; got it with "
                f"{'context' if context is not None else 'position_ids_kv'}. Leave one of the two out."
            )
        source = x if context is None else context
        for name, tokens in (("x", x), ("context", source)):
            if tokens.ndim != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[2] != self.query.in_features:
                raise ValueError(
                    f"MultiHeadAttention: {name} must be (batch, length, {self.query.in_features}), with one batch "
                    f"size; got x.shape={x.shape}, {name}.shape={tokens.shape}."
                )
        batch, seq_q, _ = x.shape
        if position_ids_q is not None:
            position_ids_q = check_positions("MultiHeadAttention", "position_ids_q", position_ids_q, batch, seq_q)
        if position_ids_kv is not None:
            position_ids_kv = check_positions(
                "MultiHeadAttention", "position_ids_kv", position_ids_kv, batch, source.shape[1]
            )
        query = self._split_heads(self.query(x), self.num_heads)
        key = self._split_heads(self.key(source), self.num_kv_heads)
        value = self._split_heads(self.value(source), self.num_kv_heads)

        if kv_cache is not None and position_ids_q is None:
            position_ids_q = kv_cache.next_positions()[:, None] + jnp.arange(seq_q, dtype=jnp.int32)[None, :]
        if context is None and position_ids_kv is None:
            position_ids_kv = position_ids_q
        if self.rope is not None:
            query, key = self.rope(query, position_ids_q), self.rope(key, position_ids_kv)

        mask = None if mask is None else as_mask(mask)
        score_mod = compose_score_mods(self.score_mod, score_mod)
        if kv_cache is not None:
            assert position_ids_q is not None
            if mask is not None:  # read at positions, so an array must know all that the cache can hold
                mask.check("MultiHeadAttention, with a cache", (batch, self.num_heads, *2 * (kv_cache.max_len,)))
            kv_cache = update_kv_layer_cache(kv_cache, key, value, positions=position_ids_q)
            key, value = kv_cache.keys.astype(query.dtype), kv_cache.values.astype(query.dtype)
            mask = at_positions(mask, position_ids_q, kv_cache.positions)
            if score_mod is not None:
                score_mod = at_positions(score_mod, position_ids_q, kv_cache.positions)

        dropout_rng = self.dropout.key(deterministic, rngs)
        heads = self.attention_fn(
            query,
            key,
            value,
            mask=mask_argument(
                "MultiHeadAttention", self.attention_fn, mask, (batch, self.num_heads, seq_q, key.shape[2])
            ),
            score_mod=score_mod,
            dropout_rng=dropout_rng,
            dropout_rate=self.dropout.rate,
            deterministic=dropout_rng is None,
        )
        if kv_cache is not None:  # a dropped write must not pass unseen
            heads = jnp.where(kv_cache.overflowed, jnp.nan, heads)
        return self.out(heads.swapaxes(1, 2).reshape(batch, seq_q, -1)), kv_cache

    def _split_heads(self, projected: Float[Array, "B T NH"], num_heads: int) -> Float[Array, "B N T H"]:
        batch, length, _ = projected.shape
        return projected.reshape(batch, length, num_heads, self.head_dim).swapaxes(1, 2)
