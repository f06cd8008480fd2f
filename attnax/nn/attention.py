"""Multi-head attention as a layer: projections, rotary positions, dropout and cache around any `AttentionFn`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from attnax.cache import LayerCache
from attnax.checks import check_options, check_positions, is_concrete
from attnax.config import BlockConfig, resolve_config
from attnax.kernels.score_mods import alibi_mod, compose_score_mods, soft_cap_mod
from attnax.masks import Mask, as_mask, at_positions, kernel_of, sliding_window
from attnax.nn._hidden import refuse_hidden_arrays, refuse_hidden_arrays_of_kernel
from attnax.nn._kernel import Heads, Kernel, attend_cache, attention_function, check_cache
from attnax.nn._parts import check_function, name_of
from attnax.nn._run import SelfAttentionOptions
from attnax.nn._token_scalars import check_scalar_cache, check_token_scalars, place_scalars
from attnax.nn.dropout import Dropout
from attnax.nn.linear import Linear
from attnax.nn.norms import rms_norm_of
from attnax.nn.rope import RotaryEmbedding
from attnax.typing import Array, ArrayLike, AttentionFn, Float, Int, MaskMod, ScoreMod

__all__ = ["KeysValues", "MultiHeadAttention"]


class KeysValues(NamedTuple):
    """The projected keys and values of a context, computed once and attended many times.

    Attributes:
        keys: (batch, num_kv_heads, S, head_dim), rotated.
        values: (batch, num_kv_heads, S, value_head_dim).
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S Hv"]


class MultiHeadOptions(SelfAttentionOptions, total=False):
    """The options of `MultiHeadAttention`, as its `__call__` describes them."""

    context: Float[Array, "B S Dc"] | KeysValues | None
    mask: Mask | MaskMod | ArrayLike | None
    position_ids_q: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None
    position_ids_kv: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None
    kv_cache: LayerCache | None
    mix_values: Callable[[Array], Array] | None


class MultiHeadAttention(nnx.Module):
    """Grouped multi-head attention, of x to itself or to a context.

    Called as `MultiHeadAttention(rngs, config)` or with fields of BlockConfig as keywords; without a config, other
    fields have the defaults of BlockConfig. By default no mask is applied, and each token attends all tokens, later
    ones too: pass `mask=masks.causal()` where tokens must not see later ones. Without a mask only the config's
    `attention_window` hides keys, those of self-attention that are too far away.

    Args:
        rngs: for the initial weights and the stored dropout stream.
        config: a BlockConfig.
        in_features: width of x (the config's d_model).
        qkv_features: width of all query heads together, by default in_features.
        out_features: width of the result, by default in_features.
        context_features: width of the context, by default in_features.
        attention_fn: computes the attention of the projected, rotated heads; by default the function that the
            config's `attention_type` names.
        score_mod: applied to the scores of every call, before the score mod of the call. A score_mod, rope or
            attention_fn that holds arrays must be a callable pytree or an nnx.Module, so that the arrays are part of
            the layer's state. NumPy arrays are constants.
        rope: a function `(heads, position_ids) -> heads` that rotates queries and keys, by default the config's.
        query_norm: norm of the queries before the rotation, over each head or all heads by its `num_features`.
        key_norm: the same for the keys.
        query_fn: a function `(heads, x) -> heads` of the projected queries (batch, num_heads, T, head_dim), after the
            norm and before the rotation, and of x (batch, T, in_features). It must act on each token alone, because a
            cache keeps transformed tokens. Its arrays must be state, like those of a score_mod.
        key_fn: the same for the keys (batch, num_kv_heads, S, head_dim); x is the context, if there is one.
        value_fn: the same for the values (batch, num_kv_heads, S, value_head_dim), which no rotation follows.
        token_scalars: numbers of each token that enter the scores, as `attnax.nn.TokenScalars` describes; for
            self-attention. Its cache is a ScalarCache (`attnax.cache.init_scalar_cache`); `generate` makes it.
        **fields: other fields of BlockConfig (num_heads, num_kv_heads, dropout_rate, attention_window, ...), and
            `use_rope`.

    A profile shows the operations under "attention" and the name of the attention function. Policies of
    `jax.checkpoint` may save arrays by name: "attention_query", "attention_key" and "attention_value", projected and
    rotated, and "attention_out", the output of the heads. One such policy is
    `jax.checkpoint_policies.save_only_these_names("attention_out")`.

    Raises:
        ValueError: options that do not fit together, or a score_mod, rope or attention_fn that reads a floating JAX
            array which is none of its leaves. A score_mod that works only at the sizes of a call raises in that call.

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
        Z. Qiu et al., "Gated Attention for Large Language Models", 2025, https://arxiv.org/abs/2505.06708.
        Z. Lin et al., "Forgetting Transformer: Softmax Attention with a Forget Gate", 2025,
        https://arxiv.org/abs/2503.02130.
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
        query_fn: Callable[[Array, Array], Array] | None = None,
        key_fn: Callable[[Array, Array], Array] | None = None,
        value_fn: Callable[[Array, Array], Array] | None = None,
        token_scalars: nnx.Module | None = None,
        **fields: Any,
    ):
        if config is not None and (in_features is not None or qkv_features is not None):
            raise ValueError(
                "MultiHeadAttention: a config sets the sizes; got a config and in_features or qkv_features. "
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
        out_features = config.d_model if out_features is None else out_features
        of_heads, of_keys = ("embed", ("heads", heads)), ("embed", ("heads", kv_heads))
        self.query = Linear(rngs, config, config.d_model, heads * head_dim, bias="query", axes=of_heads)
        self.key = Linear(rngs, config, context_features, kv_heads * head_dim, bias="key", axes=of_keys)
        self.value = Linear(rngs, config, context_features, kv_heads * value_dim, bias="value", axes=of_keys)
        scale = config.residual_init_scale
        of_out = of_heads[::-1]
        self.out = Linear(rngs, config, heads * value_dim, out_features, bias="out", axes=of_out, scale=scale)
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
        self.attention_fn = _as_attribute(attention_function(rngs, config) if attention_fn is None else attention_fn)
        self.score_mod = _as_attribute(score_mod)
        self.query_fn, self.key_fn, self.value_fn = map(_as_attribute, (query_fn, key_fn, value_fn))
        self.token_scalars = nnx.data(token_scalars)
        self.gate = nnx.data(_gate(rngs, config))
        self.scalar_heads = self._check_functions()
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
        mix_values: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T Do"] | tuple[Float[Array, "B T Do"], Any]:
        """The attention of each token of x to the tokens of `context`, or of x itself.

        Args:
            x: (batch, T, in_features).
            context: (batch, S, context_features) for cross-attention, or its `keys_values`; by default x.
            mask: True to attend, by default all; a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array that
                broadcasts to (batch, num_heads, T, S). With a cache, column j of an array is position j of the row's
                text, padding not counted; positions without a column are hidden. Row i is token i of x, or position i
                if the array has max_len rows.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids_q: positions of x, (T,) or (batch, T), for RoPE and for the cache, by default 0 ... T - 1, or
                the positions after the cache; -1 marks padding. Without a cache, masks and score mods are read at
                indices; `attnax.masks.at_positions` reads them at positions.
            position_ids_kv: positions of the context for RoPE, by default 0 ... S - 1.
            score_mod: applied to the scores after the layer's own.
            kv_cache: a cache of any kind (`attnax.cache`); x is appended to the cache and attends all of it. Masks and
                score mods are then read at positions; with an EmptyCache at indices, as without a cache.
            mix_values: a function of the values (batch, num_kv_heads, S, value_head_dim), after value_fn and before
                they enter the cache; for example one that adds the `values` of the first layer.
            rngs: randomness of the dropout, instead of the stored stream.

        Returns:
            (batch, T, out_features); with a cache, the pair (result, new cache).

        Raises:
            ValueError: arguments that do not fit together, or a full cache (under jit: NaN).
            NotImplementedError: the attention function lacks a feature, such as a cache for linear attention.
        """
        options: MultiHeadOptions = {"context": context, "mask": mask, "score_mod": score_mod, "kv_cache": kv_cache}
        options |= {"position_ids_q": position_ids_q, "position_ids_kv": position_ids_kv, "mix_values": mix_values}
        options |= {"deterministic": deterministic, "rngs": rngs}
        out, cache = self.run(x, **options)
        return out if cache is None else (out, cache)

    @jax.named_scope("attention")
    def run(self, x: Float[Array, "B T D"], **options: Unpack[MultiHeadOptions]) -> tuple[Float[Array, "B T Do"], Any]:
        """The call; it always returns (out, new cache or None)."""
        heads, kv_cache = self._attend(x, options)
        if not getattr(kernel_of(self.attention_fn), "names_residuals", False):
            heads = _named("attention_out", heads)
        if self.gate is not None:  # one number a head, or one an element
            gate = jax.nn.sigmoid(self.gate(x)).reshape(*x.shape[:2], self.config.num_heads, -1).swapaxes(1, 2)
            heads = heads * gate.astype(heads.dtype)
        return self.out(heads.swapaxes(1, 2).reshape(*x.shape[:2], self.out.in_features)), kv_cache

    def _attend(
        self, x: Array, options: MultiHeadOptions, *, weights: bool = False
    ) -> tuple[Float[Array, "B N T Hv"], Any]:
        """The output of each head, or with `weights` its attention weights, and the new cache."""
        check_options("MultiHeadAttention", options, MultiHeadOptions)
        cache, context, score_mod = options.get("kv_cache"), options.get("context"), options.get("score_mod")
        positions, kv_positions = self._check_positions(x, options)

        query = self._heads(self.query, x, self.config.num_heads, self.query_norm)
        query = _transformed("query_fn", self.query_fn, query, x)
        if self.rope is not None:
            query = self.rope(query, positions)
        if isinstance(context, KeysValues):
            key, value = context
        else:
            key, value = self.keys_values(x if context is None else context, kv_positions)
        value = _transformed("mix_values", options.get("mix_values"), value)
        query, key, value = map(_named, ("attention_query", "attention_key", "attention_value"), (query, key, value))

        scores = _scores(x.shape[0], self.config.num_heads, x.shape[1], key.shape[2])
        refuse_hidden_arrays("MultiHeadAttention", "score_mod", self.score_mod, scores)
        given, alibi = options.get("mask"), None
        mask = None if given is None else as_mask(given)
        if context is None:
            # A cache with tokens is read at positions anyway.
            is_alone = cache is None or cache.is_empty
            window, alibi = self._window_and_alibi(positions if is_alone else None, kv_positions)
            mask = window if mask is None else mask if window is None else mask & window
        cap = None if self.config.attention_soft_cap is None else soft_cap_mod(self.config.attention_soft_cap)
        of_tokens = None
        if self.token_scalars is not None:
            of_tokens, cache = place_scalars(self.token_scalars, x, positions, cache)
        score_mod = compose_score_mods(cap, alibi, of_tokens, self.score_mod, score_mod)

        dropout_rng = self.dropout.key(options.get("deterministic"), options.get("rngs"))
        heads = Heads(query, key, value, mask, score_mod, dropout_rng, positions)
        sinks = None if self.sinks is None else self.sinks[...]
        kernel = Kernel(self.attention_fn, self.dropout.rate, self.config.attention_scale, sinks)
        if weights:
            return _weights(kernel, heads), None
        return (kernel.attend(heads), None) if cache is None else attend_cache(kernel, heads, cache)

    def _check_positions(self, x: Array, options: MultiHeadOptions) -> tuple[Array | None, Any]:
        """The positions of queries and keys; raises where the arguments of a call do not fit together."""
        batch, length, _ = self._check_tokens("x", x, self.query, None)
        cache, context = options.get("kv_cache"), options.get("context")
        positions, kv_positions = options.get("position_ids_q"), options.get("position_ids_kv")
        if cache is not None:
            if context is not None or kv_positions is not None:
                raise ValueError(
                    "MultiHeadAttention: kv_cache is for self-attention, whose keys are x; got it with "
                    f"{'context' if context is not None else 'position_ids_kv'}. Leave one of the two out."
                )
            check_cache("MultiHeadAttention", self.attention_fn, cache, self.config.attention_window)
            check_scalar_cache("MultiHeadAttention", cache, self.scalar_heads)
        if context is not None and self.token_scalars is not None:
            raise ValueError(
                "MultiHeadAttention: token_scalars are for self-attention, whose queries and keys are the same tokens; "
                "got context. Leave one of the two out."
            )
        if isinstance(context, KeysValues):
            if kv_positions is not None:
                raise ValueError(
                    "MultiHeadAttention: keys that are projected are rotated too; got position_ids_kv with KeysValues. "
                    "Give the positions to keys_values."
                )
        elif context is not None:
            self._check_tokens("context", context, self.key, batch)
        if positions is not None:
            positions = check_positions("MultiHeadAttention", "position_ids_q", positions, batch, length)
        elif cache is not None:
            positions = cache.next_positions()[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        return positions, positions if context is None and kv_positions is None else kv_positions

    def _check_tokens(self, name: str, tokens: Array, layer: Linear, batch: int | None) -> tuple[int, ...]:
        if tokens.ndim != 3 or tokens.shape[2] != layer.in_features or batch not in (None, tokens.shape[0]):
            raise ValueError(
                f"MultiHeadAttention: {name} must be ({'batch' if batch is None else batch}, length, "
                f"{layer.in_features}); got {name}.shape={tokens.shape}."
            )
        return tokens.shape

    def _heads(self, layer: Linear, x: Array, num_heads: int, norm: Any) -> Float[Array, "B N T H"]:
        batch, length, _ = x.shape
        projected = layer(x)
        if norm is not None:  # over each head, or over all heads
            width = norm.num_features
            projected = norm(projected.reshape(batch, length, layer.out_features // width, width))
        return projected.reshape(batch, length, num_heads, layer.out_features // num_heads).swapaxes(1, 2)

    def keys_values(
        self, context: Float[Array, "B S Dc"], position_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None
    ) -> KeysValues:
        """The keys and values of a context; a call takes them in place of the context.

        Args:
            context: (batch, S, context_features).
            position_ids: its positions, as `position_ids_kv` of a call.
        """
        batch, length, _ = self._check_tokens("context", context, self.key, None)
        if position_ids is not None:
            position_ids = check_positions("MultiHeadAttention", "position_ids_kv", position_ids, batch, length)
        key = self._heads(self.key, context, self.config.kv_heads, self.key_norm)
        key = _transformed("key_fn", self.key_fn, key, context)
        if self.rope is not None:
            key = self.rope(key, position_ids)
        return KeysValues(key, self.values(context))

    def values(self, context: Float[Array, "B S Dc"]) -> Float[Array, "B K S Hv"]:
        """The values of x, or of a context, before any `mix_values`."""
        self._check_tokens("context", context, self.value, None)
        value = self._heads(self.value, context, self.config.kv_heads, None)
        return _transformed("value_fn", self.value_fn, value, context)

    def _window_and_alibi(self, positions: Any, kv_positions: Any) -> tuple[Mask | None, ScoreMod | None]:
        """The layer's window and ALiBi, read at positions if there are any, like RoPE; else at indices, like masks."""
        config = self.config
        window = None if config.attention_window is None else sliding_window(config.attention_window, causal=False)
        alibi = alibi_mod(config.num_heads) if config.pos_emb_type == "alibi" else None
        if positions is None:
            return window, alibi
        return (
            None if window is None else at_positions(window, positions, kv_positions),
            None if alibi is None else at_positions(alibi, positions, kv_positions),
        )

    def attention_weights(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S Dc"] | KeysValues | None = None,
        mask: Mask | MaskMod | ArrayLike | None = None,
        position_ids_q: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
        position_ids_kv: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "B N T S"]:
        """The weight of each key for each query, (batch, num_heads, T, S), for small inputs; no dropout.

        The arguments are as in a call. A row sums to 1, to less with sinks, and to 0 if no key may be attended.

        Raises:
            ValueError: an attention function of a user whose result for doubled values is not the double (under jit:
                NaN), as that of a function with a norm of the heads.
        """
        options: MultiHeadOptions = {"context": context, "mask": mask, "score_mod": score_mod, "deterministic": True}
        options |= {"position_ids_q": position_ids_q, "position_ids_kv": position_ids_kv}
        return self._attend(x, options, weights=True)[0]

    def _check_functions(self) -> int:
        """The heads of the token scalars, or 0.

        Raises ValueError for an attention function without the keywords that the config needs.

        Also refuses arrays outside of the layer's state, which would get no gradient. Functions are traced with axes
        of length 1, which broadcast against arrays of any size. A call traces the score mod again, at its own sizes.
        """
        config = self.config
        key_value = (config.kv_heads, config.head_size), (config.kv_heads, config.value_head_size)
        query, key, value = (
            jax.ShapeDtypeStruct((1, number, 1, size), config.dtype)
            for number, size in ((config.num_heads, config.head_size), *key_value)
        )
        for name in ("attention_fn", "score_mod", "rope", "query_fn", "key_fn", "value_fn"):
            check_function("MultiHeadAttention", name, getattr(self, name))
        scores = _scores(1, config.num_heads, 1, 1)
        refuse_hidden_arrays("MultiHeadAttention", "score_mod", self.score_mod, scores)
        refuse_hidden_arrays("MultiHeadAttention", "rope", self.rope, (query, jax.ShapeDtypeStruct((1, 1), jnp.int32)))
        refuse_hidden_arrays_of_kernel("MultiHeadAttention", self.attention_fn, (query, key, value), scores)
        for name, heads, width in (
            ("query_fn", query, self.query.in_features),
            ("key_fn", key, self.key.in_features),
            ("value_fn", value, self.value.in_features),
        ):
            x = jax.ShapeDtypeStruct((1, 1, width), config.dtype)
            refuse_hidden_arrays("MultiHeadAttention", name, getattr(self, name), (heads, x))
        for field, keyword in (("attention_sinks", "return_lse"), ("attention_scale", "scale")):
            if getattr(config, field) and keyword not in inspect.signature(self.attention_fn).parameters:
                raise ValueError(
                    f"MultiHeadAttention: {field} needs an attention function with {keyword}; "
                    f"got attention_fn={self.attention_fn!r}. Use one of the softmax kernels."
                )
        if self.token_scalars is None:
            return 0
        return check_token_scalars("MultiHeadAttention", self.token_scalars, config, self.attention_fn, scores)


def _named(name: str, x: Array) -> Array:
    """x under a name for policies of `jax.checkpoint`; naming a concrete array would only compile a program."""
    return x if is_concrete(x) else checkpoint_name(x, name)


def _scores(batch: int, num_heads: int, seq_q: int, seq_kv: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the arguments of a score mod, (scores, b, h, q, kv), for all pairs at once."""
    shapes = (batch, 1, 1, 1), (1, num_heads, 1, 1), (1, 1, seq_q, 1), (1, 1, 1, seq_kv)
    indices = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
    return jax.ShapeDtypeStruct((batch, num_heads, seq_q, seq_kv), jnp.float32), *indices


def _weights(kernel: Kernel, heads: Heads) -> Float[Array, "B N T S"]:
    """The result for unit vectors as values, which are the weights if the result is a weighted sum of the values."""
    keys = heads.key.shape[2]
    unit = jnp.broadcast_to(jnp.eye(keys, dtype=heads.key.dtype), (*heads.key.shape[:3], keys))
    function = kernel_of(kernel.function)
    if str(getattr(function, "__module__", "")).startswith("attnax."):
        return kernel.attend(heads._replace(value=unit))
    message = (
        "MultiHeadAttention.attention_weights: the attention function must be a weighted sum of the values, of any "
        f"width; got attention_fn={name_of(function)}, which is none. Define attention_weights "
        "in a class derived from MultiHeadAttention."
    )
    try:
        once, twice = (kernel.attend(heads._replace(value=value)) for value in (unit, 2 * unit))
    except TypeError as error:  # shapes that do not fit
        raise ValueError(message) from error
    is_sum = jnp.allclose(twice, 2 * once, rtol=1e-2, atol=1e-6, equal_nan=True)
    if is_concrete(is_sum) and not is_sum:
        raise ValueError(message)
    return jnp.where(is_sum, once, jnp.nan)


def _as_attribute(function: Any) -> Any:
    """The function as an attribute of a module: state if it holds arrays."""
    return function if jax.tree_util.all_leaves([function]) else nnx.data(function)


def _transformed(name: str, function: Any, heads: Array, *arguments: Array) -> Array:
    """The result of a user's function of the heads, which must have their shape."""
    if function is None:
        return heads
    check_function("MultiHeadAttention", name, function)
    result: Array = function(heads, *arguments)
    if getattr(result, "shape", None) != heads.shape:
        raise ValueError(
            f"MultiHeadAttention: {name} must return heads of the shape {heads.shape} that it gets; got "
            f"{getattr(result, 'shape', type(result).__name__)}."
        )
    return result.astype(heads.dtype)


def _gate(rngs: nnx.Rngs, config: BlockConfig) -> Linear | None:
    if config.attention_gate == "none":
        return None
    width = 1 if config.attention_gate == "head" else config.value_head_size
    return Linear(
        rngs, config, config.d_model, config.num_heads * width, bias="gate", axes=("embed", ("heads", config.num_heads))
    )


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
