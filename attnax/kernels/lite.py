"""Lite attention: one learned gate weighs each position; the output of a position is its weighted value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.checks import check_attention, wide_dtype
from attnax.kernels._core.dropout import dropout_of, dropout_words
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.key_padding import split_mask
from attnax.masks import Mask, takes_mask_objects
from attnax.typing import Array, ArrayLike, AttentionFnOptions, Float, MaskMod, ScoreMod, Shaped

__all__ = ["lite_attention"]


@takes_mask_objects
def lite_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    gate_proj: Callable[[Array], Array],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    score_mod: ScoreMod | None = None,
) -> Float[Array, "B N T Hv"]:
    """softmax(g)_j value_j with g_j = gate(query_j * key_j), over the positions that the mask allows.

    Under a causal mask the softmax of position j runs over the positions up to j: exp(g_j) / sum_{i<=j} exp(g_i).
    Time and memory are linear in the length.

    Args:
        query: (batch, num_heads, length, head_dim), any floating dtype.
        key: (batch, num_kv_heads, length, head_dim); num_heads is a multiple of num_kv_heads.
        value: (batch, num_kv_heads, length, value_dim).
        gate_proj: (..., head_dim) -> (..., 1), called on at least float32; its parameters get gradients. At padding
            and non-finite positions it is called on zeros, where its derivative must be finite.
        mask: None, `masks.causal()`, key padding (`masks.padding(...)`, or a boolean array that broadcasts to
            (batch, 1, 1, length), True for a real token), or `masks.causal() & padding`. Padding gives exactly 0.
        dropout_rng: key of the attention dropout, needed when `deterministic` is False and the rate is above 0.
        dropout_rate: probability of dropping each position's weight.
        deterministic: no dropout.
        score_mod: must be None: there are no scores of pairs.

    Returns:
        (batch, num_heads, length, value_dim) in the dtype of query; gate logits and softmax are in float32 (float64 for
        float64). A NaN or infinity at a position makes the positions whose softmax includes it NaN; all other
        positions, and their gradients, stay the same.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: a score_mod, or any other mask.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import masks
        >>> from attnax.kernels.lite import lite_attention
        >>> x = jnp.ones((1, 4, 5, 8))
        >>> out = lite_attention(x, x, x, lambda product: product.sum(-1, keepdims=True), mask=masks.causal())
        >>> [round(float(x), 2) for x in out[0, 0, :, 0]]
        [1.0, 0.5, 0.33, 0.25, 0.2]
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    options: AttentionFnOptions = {"mask": mask, "score_mod": score_mod}
    options |= {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate, "deterministic": deterministic}
    check_attention("lite_attention", query, key, value, **options)
    _check_lite(query, key, gate_proj, score_mod)
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads, value_dim = value.shape[1], value.shape[3]
    causal, real = split_mask("lite_attention", mask, (batch, num_heads, length, length))

    # Heads that share keys have an axis of their own: (B, K, G, T, ...).
    out_dtype, dtype = query.dtype, wide_dtype(query.dtype)
    grouped = batch, num_kv_heads, num_heads // num_kv_heads, length
    query, key, value = (
        x.astype(dtype) for x in (query.reshape(*grouped, head_dim), key[:, :, None], value[:, :, None])
    )
    real = jnp.broadcast_to(real[:, None, None], grouped)
    finite = real & is_finite(query) & is_finite(key) & is_finite(value)
    # Both factors become 0: the gradient of one factor is 0 times the other, which may be NaN.
    query, key, value = (jnp.where(finite[..., None], x, 0) for x in (query, key, value))

    logits = gate_proj((query * key).reshape(batch, num_heads, length, head_dim))
    if logits.shape != (batch, num_heads, length, 1):
        raise ValueError(
            f"lite_attention: gate_proj must map (..., head_dim) to (..., 1); got {logits.shape} "
            f"for {(batch, num_heads, length, head_dim)}."
        )
    weights, contaminated = _weigh(logits.reshape(grouped).astype(dtype), real, finite, causal)
    if dropout_rate > 0.0 and not deterministic:
        assert dropout_rng is not None
        b, h, position = jnp.ix_(*(jnp.arange(size) for size in (batch, num_heads, length)))
        weights = dropout_of(dropout_words(dropout_rng), dropout_rate, b, h, position, position)(weights)
    out = jnp.where((real & contaminated)[..., None], jnp.nan, weights[..., None] * value)
    return out.reshape(batch, num_heads, length, value_dim).astype(out_dtype)


def _check_lite(query: Array, key: Array, gate_proj: Any, score_mod: ScoreMod | None) -> None:
    """Raises ValueError or NotImplementedError for arguments that only lite attention refuses."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "lite_attention: a query is multiplied by the key of its own position, so there must be as many; "
            f"got query.shape={query.shape}, key.shape={key.shape}. Use a softmax kernel for cross-attention."
        )
    if not callable(gate_proj):
        raise ValueError(
            f"lite_attention: gate_proj must be a function (..., head_dim) -> (..., 1); got gate_proj={gate_proj!r}."
        )
    if score_mod is not None:
        raise NotImplementedError(
            f"lite_attention: there are no scores of pairs to modify; got score_mod={score_mod!r}. "
            "Use a softmax kernel."
        )


def _weigh(logits: Array, real: Array, finite: Array, causal: bool) -> tuple[Array, Array]:
    """The softmax of the logits (B, K, G, T) over the last axis, and where a non-finite position contaminates it.

    `real` positions are no padding; `finite` ones are real, with finite query, key and value.
    """
    finite = finite & jnp.isfinite(logits)
    # Not -inf: -inf - -inf is NaN. The lowest number vanishes too next to any finite logit.
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(finite, logits, lowest)
    non_finite = real & ~finite
    if causal:
        total, contaminated = lax.cumlogsumexp(logits, axis=3), jnp.cumsum(non_finite, axis=3) > 0
    else:
        peak = lax.stop_gradient(logits.max(3, keepdims=True, initial=lowest))
        total = peak + jnp.log(jnp.exp(logits - peak).sum(3, keepdims=True))
        contaminated = non_finite.any(3, keepdims=True)
    return jnp.where(finite, jnp.exp(logits - total), 0), contaminated
