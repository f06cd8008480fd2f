"""The mathematics of flash attention: the share of one tile of queries and keys in the result.

A kernel computes the scores s of a row tile by tile. The softmax-weighted sum of values needs three running sums, kept
in `SoftmaxState`: the largest score m, sum_j exp(s_j - m), and sum_j exp(s_j - m) v_j. Two states of disjoint keys
merge into one, so tiles may come in any order and from any device. The backward pass recomputes the weights of a tile
from its scores and the row's log-sum-exp. Given delta = sum_j p_j dp_j = out . d_out, tiles are independent again:

    p = exp(s - lse),  dp = d_out v^T,  ds = p (dp - delta),  dq = ds k,  dk = ds^T q,  dv = p^T d_out

Scores are in units of log 2 (exp2 is the cheaper exponential), -inf where nothing is attended. Leading axes, if any,
are a batch. T queries, S keys, H and V the widths of keys and values.

References:
    M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867.
    T. Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnax.checks import wide_dtype
from attnax.typing import Array

__all__ = [
    "LOG2E",
    "SoftmaxState",
    "as_state",
    "finish",
    "in_log2",
    "in_nats",
    "initial_state",
    "mask_scores",
    "merge",
    "product",
    "select",
    "tile_gradients",
    "unit",
    "update",
]

LOG2E = 1.4426950408889634

OfTile = Callable[[Array], Array]
"""A function of a tile (..., T, S): the dropout of weights, or the score mod of scores."""


def unit(*, has_score_mod: bool) -> float:
    """The factor of the scores in a tile: 1 if there is a score mod, which takes natural scores, else log2(e)."""
    return 1.0 if has_score_mod else LOG2E


def in_nats(lse: Array) -> Array:
    """A log-sum-exp in units of log 2 as a natural one."""
    return lse / LOG2E


def in_log2(lse: Array) -> Array:
    """A natural log-sum-exp in units of log 2."""
    return lse * LOG2E


class SoftmaxState(NamedTuple):
    """Softmax attention over the keys seen so far."""

    acc: Array  # (..., T, V), sum_j exp2(s_j - max) v_j
    max: Array  # (..., T), -inf before the first key
    sum: Array  # (..., T), sum_j exp2(s_j - max)


def initial_state(shape_T: tuple[int, ...], value_dim: int, dtype: jnp.dtype) -> SoftmaxState:
    """The state before the first key."""
    return SoftmaxState(
        jnp.zeros((*shape_T, value_dim), dtype), jnp.full(shape_T, -jnp.inf, dtype), jnp.zeros(shape_T, dtype)
    )


def mask_scores(scores_TS: Array, keep: Array | None, bias: Array | None, score_mod: OfTile | None = None) -> Array:
    """The scores of a tile, after score mod and mask.

    Args:
        scores_TS: scale * q k^T; in units of log 2 unless there is a score mod.
        keep: where the mask allows the pair; None in a full tile.
        bias: added to the scores: 0, NaN for a non-finite key, -inf for an out-of-range key; None for 0.
        score_mod: of the natural scores; -inf and float32's lowest number count as masked.
    """
    if score_mod is not None:
        # Forbidden pairs have the score 0: the mod's derivative there must not matter.
        scores_TS = score_mod(scores_TS if keep is None else select(keep, scores_TS, 0))
        # Not `>`: a NaN from the mod must stay, except at out-of-range keys.
        masked = scores_TS <= float(jnp.finfo(jnp.float32).min)
        if bias is not None:
            masked = masked | (bias == -jnp.inf)
        keep = ~masked if keep is None else keep & ~masked
        scores_TS = scores_TS * LOG2E
    if bias is not None:
        scores_TS = scores_TS + bias
    return scores_TS if keep is None else select(keep, scores_TS, -jnp.inf)


def update(
    state: SoftmaxState,
    scores_TS: Array,
    value_SV: Array,
    *,
    masked: bool = True,
    dropout: OfTile | None = None,
    exp2: OfTile = jnp.exp2,
) -> SoftmaxState:
    """The state after the keys of one more tile.

    Args:
        state: of the keys before.
        scores_TS: of the tile, in units of log 2.
        value_SV: the tile's values.
        masked: whether scores may be -inf.
        dropout: of the tile's weights.
        exp2: 2 to the power of an array, as an engine computes it.
    """
    peak_T = jnp.maximum(state.max, scores_TS.max(-1))
    # exp2(-inf - -inf) is NaN, so the peak of a row that has attended nothing yet counts as 0.
    zero_T = select(peak_T != -jnp.inf, peak_T, 0) if masked else peak_T
    weights_TS = exp2(scores_TS - zero_T[..., None])
    shrink_T = jnp.exp2(state.max - zero_T)
    sum_T = state.sum * shrink_T + weights_TS.sum(-1)
    if dropout is not None:
        weights_TS = dropout(weights_TS)
    return SoftmaxState(state.acc * shrink_T[..., None] + product(weights_TS, value_SV, 1, 0), peak_T, sum_T)


def merge(left: SoftmaxState, right: SoftmaxState) -> SoftmaxState:
    """The state over the keys of both; associative."""
    peak_T = jnp.maximum(left.max, right.max)
    zero_T = select(peak_T != -jnp.inf, peak_T, 0)
    left_T, right_T = jnp.exp2(left.max - zero_T), jnp.exp2(right.max - zero_T)
    return SoftmaxState(
        left.acc * left_T[..., None] + right.acc * right_T[..., None],
        peak_T,
        left.sum * left_T + right.sum * right_T,
    )


def as_state(out: Array, lse: Array) -> SoftmaxState:
    """A finished result as a state, as if its keys were one key; `lse` is in units of log 2."""
    return SoftmaxState(out, lse, jnp.where(lse == -jnp.inf, 0, jnp.ones_like(lse)))


def finish(state: SoftmaxState) -> tuple[Array, Array]:
    """(out, log-sum-exp in units of log 2): 0 and -inf for a row that attended nothing."""
    any_T = state.sum != 0
    total_T = select(any_T, state.sum, 1)
    return state.acc / total_T[..., None], select(any_T, state.max + jnp.log2(total_T), -jnp.inf)


def tile_gradients(
    scores: Array,
    lse: Array,
    delta: Array,
    d_weights: Array,
    *,
    masked: bool = True,
    dropout: OfTile | None = None,
    exp2: OfTile = jnp.exp2,
) -> tuple[Array, Array]:
    """(weights after dropout, gradient of the natural scores), in the shape of the scores, (..., T, S) or (..., S, T).

    Args:
        scores: as given to `update`.
        lse: of the whole row, from `finish`, broadcast against the scores; NaN contaminates the keys that the row
            attends.
        delta: out . d_out of the row, minus the cotangent of its natural log-sum-exp, broadcast likewise.
        d_weights: d_out v^T.
        masked: whether scores may be -inf.
        dropout: the same as in `update`.
        exp2: the same as in `update`.
    """
    weights = exp2(scores - lse)
    if masked:
        weights = select(scores != -jnp.inf, weights, 0)
    if dropout is None:
        return weights, weights * (d_weights - delta)
    return dropout(weights), weights * (dropout(d_weights) - delta)


def select(where: Array, x: Array, otherwise: int | float) -> Array:
    """`x` where the condition holds, else one number: `jnp.where` in half the equations."""
    return lax.select(jnp.broadcast_to(where, x.shape), x, lax.full_like(x, otherwise))


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Product of two batches of matrices over the named axes of the matrices, summed in float32 at least.

    Both are cast to the narrower dtype: tensor cores multiply weights and bfloat16 values as bfloat16.
    """
    dtype = min(left.dtype, right.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    batch = tuple(range(left.ndim - 2))
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((len(batch) + left_axis,), (len(batch) + right_axis,)), (batch, batch)),
        # No TF32, and no bfloat16 on a TPU, whose products of bfloat16 take no precision.
        precision=None if jnp.finfo(dtype).bits == 16 else lax.Precision.HIGHEST,
        preferred_element_type=wide_dtype(dtype),
    )
