"""Scaled dot-product attention as it is defined: every score, one softmax, O(T * S) memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax

from attnax.checks import apply_score_mod, attention_options, check_attention, wide_dtype
from attnax.kernels._core.dropout import dropout_of, words_of
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.lift import Lifted, lift, sum_in_float32
from attnax.kernels._core.pairs import check_pairs
from attnax.kernels._core.shards import Offset, find_shards
from attnax.masks import Mask, index_grid, resolve_masks, takes_mask_objects
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, MaskMod, ScoreMod, Shaped

__all__ = ["attention_weights", "standard_attention"]


class _Out(AttentionOptions, total=False):
    return_lse: Literal[False]


class _OutAndLse(AttentionOptions):
    return_lse: Literal[True]


@overload
def standard_attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_Out]) -> Array: ...
@overload
def standard_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@takes_mask_objects
def standard_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ key^T) @ value, over the pairs that the mask allows.

    This is the readable definition. Tests compare the fast kernels with it. Derivatives of any order work, forward and
    reverse.

    Args:
        query: (batch, num_heads, seq_q, head_dim), any floating dtype.
        key: (batch, num_kv_heads, seq_kv, head_dim); num_heads is a multiple of num_kv_heads.
        value: (batch, num_kv_heads, seq_kv, value_dim).
        mask: True to attend, by default all: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array that
            broadcasts to (batch, num_heads, seq_q, seq_kv). A query with nothing to attend gives exactly 0.
        score_mod: `(scores, b, h, q, kv) -> scores` on the scaled scores; -inf counts as masked.
        dropout_rng: key of the attention dropout, needed when `deterministic` is False and the rate is above 0.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.

    Returns:
        (batch, num_heads, seq_q, value_dim) in the dtype of query, and with `return_lse` the log-sum-exp
        (batch, num_heads, seq_q), -inf where nothing is attended. Scores, softmax, sums and log-sum-exp are in
        float32 (float64 for float64). A NaN or infinity in a key or value makes the queries that may attend it NaN
        and leaves all other queries, and their gradients, untouched.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import masks, standard_attention
        >>> x = jnp.ones((1, 4, 5, 8))
        >>> standard_attention(x, x[:, :2], x[:, :2], mask=masks.causal()).shape
        (1, 4, 5, 8)

    References:
        A. Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    check_attention("standard_attention", query, key, value, **options)
    batch, num_heads, seq_q, _ = query.shape
    score_shape = batch, num_heads, seq_q, key.shape[2]
    mask, score_mod = resolve_masks("standard_attention", mask, score_mod, score_shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    words, attend = words_of(options), partial(_attend, dropout_rate)
    shards = find_shards("standard_attention", query, key, value)
    if shards is None:
        out, lse = attend(index_grid(*score_shape), query, key, value, mask, score_mod, scale, words)
    else:
        functions = shards.whole(mask), shards.whole(score_mod)
        check_pairs("standard_attention, on the shards of a mesh", *functions, score_shape, frozenset())
        here = shards.local(query)
        scores = jax.ShapeDtypeStruct((*here.shape[:3], score_shape[3]), wide_dtype(query.dtype))
        lifted = _lift(*functions, scores)

        def on_shard(offset: Offset, query: Array, key: Array, value: Array, rest: tuple[Any, ...]) -> Any:
            rows, heads, *_ = query.shape
            b, h, q, kv = index_grid(rows, heads, seq_q, key.shape[2])
            return attend((*offset.moved(b, h), q, kv), query, key, value, *rest)

        out, lse = shards.run(on_shard, query, key, value, (*lifted, scale, words))
    return (out, lse) if return_lse else out


def attention_weights(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "B N T S"]:
    """softmax(scale * query @ key^T) in float32, with the arguments of `standard_attention`; for small inputs.

    A query with nothing to attend has the weights 0.

    Raises:
        ValueError: as `standard_attention` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import masks
        >>> from attnax.kernels.standard import attention_weights
        >>> x = jnp.ones((1, 2, 3, 5))
        >>> attention_weights(x, x, mask=masks.causal())[0, 0, 1].tolist()
        [0.5, 0.5, 0.0]
    """
    query, key = jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)
    identity = jnp.broadcast_to(jnp.eye(key.shape[-2], dtype=jnp.float32), (*key.shape[:-1], key.shape[-2]))
    return standard_attention(query, key, identity, mask=mask, score_mod=score_mod, scale=scale)


def _lift(mask: Any, score_mod: Any, scores: Any) -> tuple[Lifted | None, Lifted | None]:
    """The mask and the score mod for scores of this shape, with the arrays that they capture as operands."""
    indices = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in index_grid(*scores.shape)]
    change = partial(apply_score_mod, "standard_attention", score_mod)
    return (
        None if mask is None else lift(mask, *indices),
        None if score_mod is None else lift(change, scores, *indices),
    )


def _attend(
    dropout_rate: float,
    indices: tuple[Array, Array, Array, Array],
    query: Array,
    key: Array,
    value: Array,
    mask: Callable[..., Array] | None,
    score_mod: ScoreMod | None,
    scale: Any,
    words: Array | None,
) -> tuple[Array, Array]:
    """(out, log-sum-exp) of queries and keys at `indices`, (b, h, q, kv) of every pair."""
    batch, num_heads, seq_q, head_dim = query.shape
    num_kv_heads, seq_kv, value_dim = value.shape[1:]
    score_shape = batch, num_heads, seq_q, seq_kv

    # A masked weight is 0, but 0 * NaN is NaN: non-finite rows count as 0, and NaN is added to the pairs that see them.
    out_dtype, dtype = query.dtype, wide_dtype(query.dtype)
    query_finite = is_finite(query)
    key_finite = is_finite(key) & is_finite(value)
    query, key, value = (
        jnp.where(finite[..., None], x.astype(dtype), 0)
        for x, finite in ((query, query_finite), (key, key_finite), (value, key_finite))
    )

    # Heads that share keys become rows of one product: X = B * K and M = (N / K) * T.
    groups, rows = batch * num_kv_heads, num_heads // num_kv_heads * seq_q
    query = query.reshape(groups, rows, head_dim)
    key, value = key.reshape(groups, seq_kv, head_dim), value.reshape(groups, seq_kv, value_dim)
    scores = jnp.einsum("XMH,XSH->XMS", query, key, precision=lax.Precision.HIGHEST)
    scores = scores.reshape(score_shape) * jnp.asarray(scale, dtype)

    keep = jnp.ones((1, 1, 1, 1), bool)
    if mask is not None:
        keep = mask(*indices)
    if score_mod is not None:
        # The first `where` keeps the mod's derivative at forbidden pairs out of the gradients of query and key.
        scores = jnp.where(keep, scores, 0)
        scores = apply_score_mod("standard_attention", partial(sum_in_float32, score_mod), scores, *indices)
        keep = keep & ~(scores <= float(jnp.finfo(jnp.float32).min))  # not `>`: a NaN from a mod must be seen
    # The contamination of the scores of a pair.
    of_query = jnp.where(query_finite, 0, jnp.nan)[..., None]
    # Not jnp.repeat, which fails outside of jit on a shard of a mesh with Explicit axes.
    of_key = jnp.where(key_finite, 0, jnp.nan)[:, :, None, None, :]
    of_key = jnp.broadcast_to(of_key, (batch, num_kv_heads, num_heads // num_kv_heads, 1, seq_kv))
    of_key = of_key.reshape(batch, num_heads, 1, seq_kv)
    scores = jnp.where(keep, scores + (of_query + of_key), -jnp.inf)

    peak = scores.max(-1, keepdims=True, initial=-jnp.inf)
    peak = lax.stop_gradient(jnp.where(peak == -jnp.inf, 0, peak))
    weights = jnp.where(keep, jnp.exp(scores - peak), 0)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    if words is not None:
        weights = dropout_of(words, dropout_rate, *indices)(weights)

    weights = weights.reshape(groups, rows, seq_kv)
    out = jnp.einsum("XMS,XSV->XMV", weights, value, precision=lax.Precision.HIGHEST)
    out = out.reshape(batch, num_heads, seq_q, value_dim)
    # A contaminated row is all NaN, a row that attended nothing is 0. The cotangents of both stop here and reach no key
    # that the row may not attend.
    out = jnp.where(is_finite(out)[..., None], out, jnp.nan)
    out = jnp.where(empty, 0, out / jnp.where(empty, 1, total)).astype(out_dtype)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1, total)))
    return out, lse[..., 0]
