"""Multi-head attention as a layer: projections, rotary positions, dropout and cache around any `AttentionFn`."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from attnax.cache import EmptyCache, LayerCache, LinearLayerCache
from attnax.checks import check_positions, is_concrete
from attnax.config import AttentionType, BlockConfig, resolve_config
from attnax.kernels.cached import cached_attention
from attnax.kernels.flash import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.kernels.linear import linear_attention
from attnax.kernels.lite import lite_attention
from attnax.kernels.score_mods import alibi_mod, compose_score_mods, soft_cap_mod
from attnax.kernels.standard import standard_attention
from attnax.masks import (
    Causal,
    Mask,
    as_mask,
    at_positions,
    causal,
    mask_argument,
    mask_of_cache,
    padding,
    sliding_window,
)
from attnax.nn._hidden import refuse_hidden_arrays, refuse_hidden_arrays_of_kernel
from attnax.nn.dropout import Dropout
from attnax.nn.linear import Linear
from attnax.nn.norms import rms_norm_of
from attnax.nn.rope import RotaryEmbedding
from attnax.typing import Array, ArrayLike, AttentionFn, Float, Int, MaskMod, ScoreMod

__all__ = ["KeysValues", "MultiHeadAttention"]


class KeysValues(NamedTuple):
    """A context as a cross-attention layer sees it, projected once and attended many times.

    Attributes:
        keys: (batch, num_kv_heads, S, head_dim), rotated.
        values: (batch, num_kv_heads, S, value_head_dim).
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S Hv"]


class MultiHeadAttention(nnx.Module):
    """Grouped multi-head attention, of x to itself or to a context.

    Called as `MultiHeadAttention(rngs, config)` or with keywords.

    Args:
        rngs: for the initial weights and the stored dropout stream.
        config: a BlockConfig.
        in_features: width of x (the config's d_model).
        qkv_features: width of all query heads together, by default in_features.
        out_features: width of the result, by default in_features.
        context_features: width of the context, by default in_features.
        attention_fn: what computes the attention of the projected, rotated heads, by default what the config's
            `attention_type` names.
        score_mod: applied to the scores of every call, before a per-call one. A score_mod, rope or attention_fn that
            holds arrays must be a callable pytree or an nnx.Module, so that the arrays are part of the layer's state.
            NumPy arrays are constants.
        rope: turns queries and keys, a function `(heads, position_ids) -> heads`, by default the config's.
        query_norm: norm of the queries before that, over a head or over all of them by its `num_features`.
        key_norm: the same for the keys.
        **fields: other fields of BlockConfig (num_heads, num_kv_heads, dropout_rate, attention_window, ...), and
            `use_rope`.

    A profile shows the operations under "attention" and the name of the attention function. Policies of
    `jax.checkpoint` may save arrays by name: "attention_query", "attention_key" and "attention_value", projected and
    rotated, and "attention_out", the output of the heads. One such policy is
    `jax.checkpoint_policies.save_only_these_names("attention_out")`.

    Raises:
        ValueError: options that do not fit together, or a score_mod, rope or attention_fn that reads a floating JAX
            array which is none of its leaves. A score_mod that works at the sizes of a call alone raises in that call.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import MultiHeadAttention, masks
        >>> attn = MultiHeadAttention(nnx.Rngs(0), num_heads=8, in_features=64, num_kv_heads=2, use_rope=True)
        >>> attn(jnp.zeros((1, 5, 64)), mask=masks.causal()).shape
        (1, 5, 64)

    References:
        J. Ainslie et al., "GQA", 2023, https://arxiv.org/abs/2305.13245.
        G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
        https://arxiv.org/abs/2309.17453.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: BlockConfig | None = None,
        *,
        in_features: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        context_features: int | None = None,
        attention_fn: AttentionFn | None = None,
        score_mod: ScoreMod | None = None,
        rope: Any = None,
        query_norm: nnx.Module | None = None,
        key_norm: nnx.Module | None = None,
        **fields: Any,
    ):
        if config is not None and (in_features is not None or qkv_features is not None):
            raise ValueError(
                "MultiHeadAttention: a config says the sizes; got it with in_features or qkv_features. "
                "Use dataclasses.replace(config, d_model=..., head_dim=...)."
            )
        if in_features is not None:
            fields["d_model"] = in_features
        if qkv_features is not None:
            fields["head_dim"] = _head_dim(qkv_features, fields.get("num_heads", BlockConfig.num_heads))
        self.config = config = resolve_config(BlockConfig, config, fields)
        heads, kv_heads = config.num_heads, config.kv_heads
        head_dim, value_dim = config.head_size, config.value_head_size
        context_features = config.d_model if context_features is None else context_features
        self.query = Linear(rngs, config, config.d_model, heads * head_dim, bias="query")
        self.key = Linear(rngs, config, context_features, kv_heads * head_dim, bias="key")
        self.value = Linear(rngs, config, context_features, kv_heads * value_dim, bias="value")
        self.out = Linear(
            rngs,
            config,
            heads * value_dim,
            config.d_model if out_features is None else out_features,
            bias="out",
            scale=config.residual_init_scale,
        )
        self.query_norm = nnx.data(_head_norm(config, heads, rngs) if query_norm is None else query_norm)
        self.key_norm = nnx.data(_head_norm(config, kv_heads, rngs) if key_norm is None else key_norm)
        if rope is None and config.pos_emb_type == "rope":
            rope = RotaryEmbedding(
                head_dim,
                config.rope_max_positions,
                base=config.rope_base,
                fraction=config.rope_fraction,
                scaling=config.rope_scaling,
            )
        self.rope = _as_attribute(rope)
        attention_fn = _attention_function(rngs, config) if attention_fn is None else attention_fn
        self.attention_fn = _as_attribute(attention_fn)
        self.score_mod = _as_attribute(score_mod)
        self._refuse_hidden_arrays()
        for field, keyword in (("attention_sinks", "return_lse"), ("attention_scale", "scale")):
            if getattr(config, field) and keyword not in inspect.signature(attention_fn).parameters:
                raise ValueError(
                    f"MultiHeadAttention: {field} needs an attention function with {keyword}; "
                    f"got attention_fn={attention_fn!r}. Use one of the softmax kernels."
                )
        self.sinks = nnx.data(None)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((heads,), config.param_dtype))
        self.dropout = Dropout(config.attention_dropout, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S Dc"] | KeysValues | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids_q: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        position_ids_kv: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
        score_mod: ScoreMod | None = None,
        kv_cache: LayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T Do"] | tuple[Float[Array, "B T Do"], Any]:
        """What each token of x gathers from the tokens of `context`, or of x itself.

        Args:
            x: (batch, T, in_features).
            context: (batch, S, context_features) for cross-attention, or what `keys_values` made of it; by default x.
            mask: True to attend; a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array that broadcasts to
                (batch, num_heads, T, S). With a cache column j of an array is position j of the row's text, padding
                left out. The array may have as few columns as there are tokens so far: positions beyond them are not
                attended. Its rows are the tokens of x; max_len rows are positions.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids_q: positions of x, (T,) or (batch, T), for RoPE and for the cache, by default 0 ... T - 1, or
                what follows the cache, where -1 marks padding. Without a cache, masks and score mods are read at
                indices; `attnax.masks.at_positions` reads them at positions.
            position_ids_kv: positions of the context for RoPE, by default 0 ... S - 1.
            score_mod: applied to the scores after the layer's own.
            kv_cache: of any kind (`attnax.cache`); x is appended to it and attends all of it. Masks and score mods are
                then read at positions; with an EmptyCache at indices, as without a cache.
            rngs: randomness of the dropout, instead of the stored stream.

        Returns:
            (batch, T, out_features), or with a cache the pair of it and the new cache.

        Raises:
            ValueError: arguments that do not fit together, or a full cache (under jit: NaN).
            NotImplementedError: what the attention function lacks, such as a cache for linear attention.
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

    @jax.named_scope("attention")
    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S Dc"] | KeysValues | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids_q: ArrayLike | None = None,
        position_ids_kv: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        kv_cache: LayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T Do"], Any]:
        """The call with its result in one form: (out, new cache or None)."""
        heads, kv_cache = self._gather(
            x, context, mask, deterministic, position_ids_q, position_ids_kv, score_mod, kv_cache, rngs
        )
        if not getattr(_kernel_of(self.attention_fn), "names_residuals", False):
            heads = _named("attention_out", heads)
        return self.out(heads.swapaxes(1, 2).reshape(*x.shape[:2], self.out.in_features)), kv_cache

    def attention_weights(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S Dc"] | KeysValues | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        position_ids_q: ArrayLike | None = None,
        position_ids_kv: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "B N T S"]:
        """How much of each key's value each query takes, (batch, num_heads, T, S), for small inputs; no dropout.

        The arguments are those of a call. Rows sum to 1, to less with sinks, and to 0 with nothing to attend.
        """
        heads, _ = self._gather(
            x, context, mask, True, position_ids_q, position_ids_kv, score_mod, None, None, weights=True
        )
        return heads

    def _gather(
        self,
        x: Array,
        context: Array | KeysValues | None,
        mask: Mask | MaskMod | ArrayLike | None,
        deterministic: bool | None,
        position_ids_q: ArrayLike | None,
        position_ids_kv: ArrayLike | None,
        score_mod: ScoreMod | None,
        kv_cache: LayerCache | None,
        rngs: nnx.Rngs | None,
        *,
        weights: bool = False,
    ) -> tuple[Float[Array, "B N T Hv"], Any]:
        """What each head gathers, or with `weights` how much of each key's value that is."""
        batch, seq_q, _ = self._check_tokens("x", x, self.query, None)
        if kv_cache is not None:
            self._check_cached(context, position_ids_kv, kv_cache)
        if position_ids_q is not None:
            position_ids_q = check_positions("MultiHeadAttention", "position_ids_q", position_ids_q, batch, seq_q)
        elif kv_cache is not None:
            position_ids_q = kv_cache.next_positions()[:, None] + jnp.arange(seq_q, dtype=jnp.int32)[None, :]
        query = self._heads(self.query, x, self.config.num_heads, self.query_norm)
        if self.rope is not None:
            query = self.rope(query, position_ids_q)
        if context is None:
            key, value = self.keys_values(x, position_ids_q if position_ids_kv is None else position_ids_kv)
        elif isinstance(context, KeysValues):
            if position_ids_kv is not None:
                raise ValueError(
                    "MultiHeadAttention: keys that are projected are rotated too; got position_ids_kv with KeysValues. "
                    "Give the positions to keys_values."
                )
            key, value = context
        else:
            self._check_tokens("context", context, self.key, batch)
            key, value = self.keys_values(context, position_ids_kv)
        query, key, value = map(_named, ("attention_query", "attention_key", "attention_value"), (query, key, value))

        refuse_hidden_arrays(
            "MultiHeadAttention",
            "score_mod",
            self.score_mod,
            _scores(batch, self.config.num_heads, seq_q, key.shape[2]),
        )
        mask = None if mask is None else as_mask(mask)
        window, alibi = None, None
        if context is None and self.config.attention_window is not None:
            window = sliding_window(self.config.attention_window, causal=False)
        if context is None and self.config.pos_emb_type == "alibi":
            alibi = alibi_mod(self.config.num_heads)
        is_alone = kv_cache is None or isinstance(kv_cache, EmptyCache)  # x attends itself or the context only
        if is_alone and position_ids_q is not None:  # like RoPE they go by positions, whatever the mask goes by
            positions = position_ids_q, position_ids_q if position_ids_kv is None else position_ids_kv
            window = None if window is None else at_positions(window, *positions)
            alibi = None if alibi is None else at_positions(alibi, *positions)
        if window is not None:
            mask = window if mask is None else mask & window
        cap = None if self.config.attention_soft_cap is None else soft_cap_mod(self.config.attention_soft_cap)
        score_mod = compose_score_mods(cap, alibi, self.score_mod, score_mod)
        dropout_rng = self.dropout.key(deterministic, rngs)
        if kv_cache is not None:
            assert position_ids_q is not None
            if isinstance(kv_cache, EmptyCache):
                return self._attend_and_store(query, key, value, mask, score_mod, dropout_rng, position_ids_q, kv_cache)
            return self._attend_cache(query, key, value, mask, score_mod, dropout_rng, position_ids_q, kv_cache)
        if weights:  # what each key's value contributes, read off with a value of its own for each key
            value = jnp.broadcast_to(jnp.eye(key.shape[2], dtype=key.dtype), (*key.shape[:3], key.shape[2]))
        return self._attend(query, key, value, mask, score_mod, dropout_rng), None

    def keys_values(
        self,
        context: Float[Array, "B S Dc"],
        position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
    ) -> KeysValues:
        """The keys and values of a context, which calls take in its place; positions as `position_ids_kv` of a call."""
        batch, length, _ = self._check_tokens("context", context, self.key, None)
        if position_ids is not None:
            position_ids = check_positions("MultiHeadAttention", "position_ids_kv", position_ids, batch, length)
        key = self._heads(self.key, context, self.config.kv_heads, self.key_norm)
        if self.rope is not None:
            key = self.rope(key, position_ids)
        return KeysValues(key, self._heads(self.value, context, self.config.kv_heads, None))

    def _attend_cache(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score_mod: ScoreMod | None,
        dropout_rng: Array | None,
        positions: Array,
        cache: Any,
    ) -> tuple[Array, Any]:
        """What the heads gather from the cache and the new tokens, and the cache with these appended."""
        batch, num_heads, _, _ = query.shape
        if isinstance(cache, LinearLayerCache):
            return self._attend_sums(query, key, value, mask, score_mod, dropout_rng, positions, cache)
        if mask is not None:
            mask = mask_of_cache(mask, positions, cache.num_positions)
            full = batch, num_heads, cache.num_positions, cache.num_positions
            mask.check("MultiHeadAttention, with a cache", full)
        cache, seen = cache.append(key, value, positions)
        if self.attention_fn is flash_attention:  # the automatic choice
            read = functools.partial(cached_attention, query, seen, positions)
            return self._with_options(read, mask=mask, score_mod=score_mod, dropout_rng=dropout_rng), cache
        stored = seen.tokens(query.dtype)
        mask = at_positions(mask, positions, stored.positions)
        if score_mod is not None:
            score_mod = at_positions(score_mod, positions, stored.positions)
        heads = self._attend(query, stored.keys, stored.values, mask, score_mod, dropout_rng)
        return _nan_where_lost(heads, cache), cache

    def _attend_and_store(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score_mod: ScoreMod | None,
        dropout_rng: Array | None,
        positions: Array,
        empty: EmptyCache,
    ) -> tuple[Array, Any]:
        """What the heads gather from the new tokens, and the cache, which held nothing, with these."""
        if isinstance(empty.cache, LinearLayerCache):
            return self._attend_sums(query, key, value, mask, score_mod, dropout_rng, positions, empty.cache)
        positions = jnp.broadcast_to(positions, (query.shape[0], query.shape[2]))
        real = padding(positions >= 0)
        heads = self._attend(query, key, value, real if mask is None else mask & real, score_mod, dropout_rng)
        cache = empty.store(key, value, positions)
        return _nan_where_lost(heads, cache), cache

    def _attend_sums(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score_mod: ScoreMod | None,
        dropout_rng: Array | None,
        positions: Array,
        cache: LinearLayerCache,
    ) -> tuple[Array, LinearLayerCache]:
        if not isinstance(mask, Causal):
            raise NotImplementedError(
                "MultiHeadAttention: the sums of linear attention hold what came before, so with a cache mask must be "
                f"masks.causal(); got mask={mask!r}. Use a softmax kernel for any other."
            )
        mask = causal() & padding(jnp.broadcast_to(positions >= 0, (query.shape[0], query.shape[2])))
        attend = functools.partial(self.attention_fn, query, key, value, state=cache.state, return_state=True)
        heads, state = self._with_options(attend, mask=mask, score_mod=score_mod, dropout_rng=dropout_rng)
        lengths = jnp.maximum(cache.lengths, positions.max(1, initial=-1) + 1)
        return heads, LinearLayerCache(state, lengths)

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score_mod: ScoreMod | None,
        dropout_rng: Array | None,
    ) -> Array:
        batch, num_heads, seq_q, _ = query.shape
        full = (batch, num_heads, seq_q, key.shape[2])
        attend = functools.partial(self.attention_fn, query, key, value)
        mask_or_array = mask_argument("MultiHeadAttention", self.attention_fn, mask, full)
        return self._with_options(attend, mask=mask_or_array, score_mod=score_mod, dropout_rng=dropout_rng)

    def _with_options(self, attend: Any, *, dropout_rng: Array | None, **options: Any) -> Any:
        """What `attend` gathers with the layer's dropout, scale and sinks."""
        if self.config.attention_scale is not None:
            options["scale"] = self.config.attention_scale
        if self.sinks is not None:
            options["return_lse"] = True
        with jax.named_scope(_name_of(attend)):
            heads = attend(
                dropout_rng=dropout_rng, dropout_rate=self.dropout.rate, deterministic=dropout_rng is None, **options
            )
        if self.sinks is None:
            return heads
        heads, lse = heads
        share = jax.nn.sigmoid(lse - self.sinks[...].astype(lse.dtype)[None, :, None])  # of the keys beside the sink
        return (heads.astype(share.dtype) * share[..., None]).astype(heads.dtype)

    def _heads(self, layer: Linear, x: Array, num_heads: int, norm: Any) -> Float[Array, "B N T H"]:
        batch, length, _ = x.shape
        projected = layer(x)
        if norm is not None:  # over a head, or over all of them
            width = norm.num_features
            projected = norm(projected.reshape(batch, length, layer.out_features // width, width))
        return projected.reshape(batch, length, num_heads, layer.out_features // num_heads).swapaxes(1, 2)

    def _refuse_hidden_arrays(self) -> None:
        """Raises ValueError for a function with arrays that are not in the layer's state and so would get no gradient.

        Axes of length 1 broadcast against arrays of any size. A call looks at the score mod again, at its sizes.
        """
        config = self.config
        heads = (config.num_heads, config.head_size), (config.kv_heads, config.head_size)
        query, key, value = (
            jax.ShapeDtypeStruct((1, number, 1, size), config.dtype)
            for number, size in (*heads, (config.kv_heads, config.value_head_size))
        )
        scores = _scores(1, config.num_heads, 1, 1)
        refuse_hidden_arrays("MultiHeadAttention", "score_mod", self.score_mod, scores)
        refuse_hidden_arrays("MultiHeadAttention", "rope", self.rope, (query, jax.ShapeDtypeStruct((1, 1), jnp.int32)))
        refuse_hidden_arrays_of_kernel("MultiHeadAttention", self.attention_fn, (query, key, value), scores)

    def _check_tokens(self, name: str, tokens: Array, layer: Linear, batch: int | None) -> tuple[int, ...]:
        fits = tokens.ndim == 3 and tokens.shape[2] == layer.in_features and batch in (None, tokens.shape[0])
        if not fits:
            raise ValueError(
                f"MultiHeadAttention: {name} must be ({'batch' if batch is None else batch}, length, "
                f"{layer.in_features}); got {name}.shape={tokens.shape}."
            )
        return tokens.shape

    def _check_cached(self, context: Any, position_ids_kv: ArrayLike | None, kv_cache: Any) -> None:
        if context is not None or position_ids_kv is not None:
            raise ValueError(
                "MultiHeadAttention: kv_cache is for self-attention, whose keys are x; got it with "
                f"{'context' if context is not None else 'position_ids_kv'}. Leave one of the two out."
            )
        if isinstance(kv_cache, EmptyCache):
            kv_cache.check("MultiHeadAttention")
            kv_cache = kv_cache.cache
        kernel = self.attention_fn
        while isinstance(kernel, functools.partial):
            kernel = kernel.func
        is_lite = isinstance(kernel, LiteAttention) or kernel is lite_attention
        if is_lite or (kernel is linear_attention) != isinstance(kv_cache, LinearLayerCache):
            name = "lite" if is_lite else "linear" if kernel is linear_attention else "softmax"
            raise NotImplementedError(
                f"MultiHeadAttention: {name} attention does not read a {type(kv_cache).__name__}. Linear attention "
                "reads a LinearLayerCache, softmax kernels the others, lite attention none."
            )
        held, own = getattr(kv_cache, "window", None), self.config.attention_window
        if held is not None and (own is None or own > held):
            raise ValueError(
                "MultiHeadAttention: a ring of a window must hold the layer's window; "
                f"got window={held}, attention_window={own}. Make the cache with that window, or with none."
            )


class LiteAttention(nnx.Module):
    """`lite_attention` with its gate, as an AttentionFn.

    Args:
        rngs: for the gate's weights.
        config: for their kind and the width of a head.
    """

    takes_mask_objects = True

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig):
        self.gate = Linear(rngs, config, config.head_size, 1, bias="query")

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        return lite_attention(query, key, value, self.gate, **options)


class _Configured(functools.partial[Any]):
    """A partial that equals its equal, so that two layers of one config are one program."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Configured) and (self.func, self.keywords) == (other.func, other.keywords)

    def __hash__(self) -> int:
        return hash((self.func, *sorted(self.keywords.items())))


def _attention_function(rngs: nnx.Rngs, config: BlockConfig) -> AttentionFn:
    size = config.attention_block_size
    match config.attention_type:
        case AttentionType.STANDARD:
            return standard_attention
        case AttentionType.MEMORY_EFFICIENT:
            return _Configured(memory_efficient_attention, block_size=size)
        case AttentionType.FLASH:
            return flash_attention if size is None else _Configured(flash_attention, block_size=size)
        case AttentionType.PALLAS_FLASH:
            return _Configured(pallas_flash_attention, block_q=size, block_kv=size)
        case AttentionType.LINEAR:  # causal where the mask is
            return _Configured(linear_attention, causal=False, chunk_size=config.linear_attention_chunk_size)
        case AttentionType.LITE:
            return LiteAttention(rngs, config)


def _kernel_of(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(function: Any) -> str:
    function = _kernel_of(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _named(name: str, x: Array) -> Array:
    """x, which a policy of `jax.checkpoint` may save by that name; untraced arrays need none, and no program."""
    return x if is_concrete(x) else checkpoint_name(x, name)


def _nan_where_lost(heads: Array, cache: Any) -> Array:
    """The heads, NaN where a write to the cache was dropped, which must not pass unseen."""
    return jnp.where(cache.overflowed.reshape(-1, 1, 1, 1), jnp.nan, heads)


def _scores(batch: int, num_heads: int, seq_q: int, seq_kv: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the arguments of a score mod for all pairs: scores, b, h, q, kv."""
    shapes = (batch, 1, 1, 1), (1, num_heads, 1, 1), (1, 1, seq_q, 1), (1, 1, 1, seq_kv)
    indices = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
    return jax.ShapeDtypeStruct((batch, num_heads, seq_q, seq_kv), jnp.float32), *indices


def _as_attribute(function: Any) -> Any:
    """The function as an attribute of a module: state if it holds arrays."""
    return function if jax.tree_util.all_leaves([function]) else nnx.data(function)


def _head_dim(qkv_features: int, num_heads: int) -> int:
    if num_heads < 1 or qkv_features % num_heads:
        raise ValueError(
            "MultiHeadAttention: qkv_features must be a multiple of num_heads; "
            f"got qkv_features={qkv_features}, num_heads={num_heads}."
        )
    return qkv_features // num_heads


def _head_norm(config: BlockConfig, num_heads: int, rngs: nnx.Rngs) -> nnx.Module | None:
    if config.qk_norm == "none":
        return None
    width = config.head_size * (1 if config.qk_norm == "head" else num_heads)
    return rms_norm_of(config, width, rngs)
