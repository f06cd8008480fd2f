"""Which rows are not finite, and the NaN with which they contaminate scores."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.checks import wide_dtype
from attnax.kernels._core import softmax
from attnax.typing import Array

__all__ = ["is_finite", "scale_query", "zero_or_nan"]


def is_finite(x: Array) -> Array:
    """Whether each row (..., H) of an array is of finite numbers."""
    return jnp.isfinite(x).all(-1)


def scale_query(query: Array, scale: Any, *, has_score_mod: bool) -> Array:
    """The query in at least float32, scaled; scores are then natural, as mods see them, or in units of log 2."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.astype(wide_dtype(query.dtype))
    query = query + zero_or_nan(query)[..., None]  # an infinity contaminates as NaN does
    return query * jnp.asarray(scale * softmax.unit(has_score_mod=has_score_mod), query.dtype)


def zero_or_nan(x: Array) -> Array:
    """0 for a finite row, NaN for a non-finite row.

    A CPU computes a product faster than `isfinite` and `all`. The factor is so small that no sum overflows.
    """
    small = jnp.full(x.shape[-1:], 2.0**-100, x.dtype)
    return lax.dot_general(x, small, (((x.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST) * 0
