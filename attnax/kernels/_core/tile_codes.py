"""The codes of a tile: the mask allows all of its pairs, some, or none."""

from __future__ import annotations

import jax.numpy as jnp

from attnax.typing import Array

__all__ = ["EMPTY", "FULL", "PARTIAL", "code_of"]

FULL, PARTIAL, EMPTY = 0, 1, 2


def code_of(some: Array, every: Array) -> Array:
    """The code of a tile, from whether any and whether all of its pairs attend."""
    return EMPTY - some.astype(jnp.int32) - (some & every).astype(jnp.int32)
