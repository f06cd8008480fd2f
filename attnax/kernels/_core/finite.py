"""Tests for non-finite rows, and the NaN that contaminates their scores."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.checks import wide_dtype
from attnax.kernels._core import softmax
from attnax.typing import Array

__all__ = ["is_finite", "scale_query", "zero_or_nan"]


def is_finite(x: Array) -> Array:
    """True for each row (..., H) of an array whose numbers are all finite."""
    return jnp.isfinite(x).all(-1)


def scale_query(query: Array, scale: Any, *, has_score_mod: bool) -> Array:
    """The scaled query, float32 or wider. Scores are natural for a score mod, else in units of log 2."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.astype(wide_dtype(query.dtype))
    query = query + zero_or_nan(query)[..., None]  # an infinity contaminates as NaN does
    return query * jnp.asarray(scale * softmax.unit(has_score_mod=has_score_mod), query.dtype)


def zero_or_nan(x: Array) -> Array:
    """0 for a finite row, NaN for a non-finite row.

    A CPU computes a product faster than `isfinite` and `all`. The small factor keeps sums from overflow.
    """
    small = jnp.full(x.shape[-1:], 2.0**-100, x.dtype)
    return lax.dot_general(x, small, (((x.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST) * 0
