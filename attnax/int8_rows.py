"""Vectors as 8-bit integers, each with a scale of its own: a quarter of float32's memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Float, Int

__all__ = ["Int8Rows", "Rows", "decode_rows", "encode_rows", "zero_rows"]


@pytree_dataclass
class Int8Rows:
    """Vectors (..., H) as 8-bit integers, each with a scale: x is about codes * scales.

    The largest element of a vector is exact to rounding; the error of every other element is at most half a step,
    max|x| / 254. A non-finite vector, which holds a NaN or infinity, is read as NaN.
    """

    codes: Int[Array, "*L H"]
    scales: Float[Array, "*L 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an array that holds the vectors."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """The dtype in which `decode_rows` computes."""
        return self.scales.dtype


Rows = Array | Int8Rows
"""Vectors as a cache stores them: an array of a floating dtype, or 8-bit integers with scales."""


def zero_rows(shape: tuple[int, ...], dtype: Any) -> Rows:
    """Storage for vectors of `shape` (..., H); ValueError unless `dtype` is a floating one or int8."""
    if jnp.dtype(dtype) != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"cache: dtype must be a floating one or int8; got dtype={jnp.dtype(dtype)}.")
    if jnp.dtype(dtype) == jnp.int8:
        return Int8Rows(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
    return jnp.zeros(shape, dtype)


def encode_rows(x: Float[ArrayLike, "*L H"], like: Rows) -> Rows:
    """Vectors in the form of the storage `like`, each rounded on its own."""
    if not isinstance(like, Int8Rows):
        return jnp.asarray(x).astype(like.dtype)
    finite = jnp.isfinite(x).all(-1, keepdims=True)  # tests each element: on a CPU the maximum may skip a NaN
    x = jnp.where(finite, x, 0).astype(like.scales.dtype)
    scales = jnp.abs(x).max(-1, keepdims=True) / 127.0
    codes = jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)
    return Int8Rows(codes, jnp.where(finite, scales, jnp.nan))


def decode_rows(rows: Rows, dtype: Any) -> Float[Array, "*L H"]:
    """Stored vectors as an array."""
    if isinstance(rows, Int8Rows):
        return (rows.codes.astype(rows.scales.dtype) * rows.scales).astype(dtype)
    return rows.astype(dtype)
