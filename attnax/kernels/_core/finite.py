"""Rows that are not finite: what they must not reach, and what they must."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.checks import wide_dtype
from attnax.kernels._core import softmax
from attnax.typing import Array

__all__ = ["scale_query", "zero_or_nan"]


def scale_query(query: Array, scale: Any, *, natural: bool) -> Array:
    """The query in at least float32, scaled; scores are then `natural`, as mods see them, or in units of log 2."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.astype(wide_dtype(query.dtype))
    query = query + zero_or_nan(query)[..., None]  # an infinity spoils as NaN does
    return query * jnp.asarray(scale if natural else scale * softmax.LOG2E, query.dtype)


def zero_or_nan(x: Array) -> Array:
    """0 for each row of numbers, NaN where one of them is not finite.

    As a product, which a CPU has sooner than `isfinite` and `all`, with a number so small that no sum overflows.
    """
    small = jnp.full(x.shape[-1:], 2.0**-100, x.dtype)
    return lax.dot_general(x, small, (((x.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST) * 0
