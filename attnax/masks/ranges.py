"""A value for each token, read at an index and bounded over a range of indices."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from attnax.masks.mask import Range
from attnax.typing import Array, Index

__all__ = ["range_bounds", "value_at"]

_BLOCK = 16  # tokens that share one pair of bounds


def value_at(values: Array, b: Index, index: Index) -> Array:
    """`values[b, index]` of (B|1, length): before the array its first value, past it its last, as in `range_bounds`."""
    return values[0 if values.shape[0] == 1 else b, jnp.maximum(index, 0)]


def range_bounds(values: Array, b: Index, index_range: Range) -> tuple[Array, Array]:
    """Bounds (least, greatest) on `values[b, first:last + 1]`, exact for a range of whole blocks of 16.

    Level j of a table holds the bounds of 2**j blocks from each block on; two entries of one level cover any range.
    """
    blocks = -(-values.shape[1] // _BLOCK)
    blocked = jnp.pad(values, ((0, 0), (0, blocks * _BLOCK - values.shape[1])), mode="edge")
    blocked = blocked.reshape(-1, blocks, _BLOCK)
    first, last = (jnp.clip(jnp.asarray(index), 0, values.shape[1] - 1) // _BLOCK for index in index_range)
    level = jnp.maximum(31 - lax.clz((last - first + 1).astype(jnp.int32)), 0)
    bounds = []
    for reduce, join in ((jnp.min, jnp.minimum), (jnp.max, jnp.maximum)):
        table = [reduce(blocked, axis=2)]
        while 2 ** len(table) <= blocks:
            half = 2 ** (len(table) - 1)
            table.append(join(table[-1], jnp.pad(table[-1][:, half:], ((0, 0), (0, half)), mode="edge")))
        levels, row = jnp.stack(table), 0 if values.shape[0] == 1 else b
        bounds.append(join(levels[level, row, first], levels[level, row, last + 1 - (1 << level)]))
    return bounds[0], bounds[1]
