"""Lists of the tiles that a program of a GPU kernel visits."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from attnax.kernels._core.tile_codes import EMPTY, FULL
from attnax.typing import Array

__all__ = ["TileList"]


class TileList(NamedTuple):
    """For each tile along one axis, the tiles along the other: full ones first, then partial, then empty ones.

    B' and N' are 1 if the mask is the same for all rows or heads.
    """

    order: Array  # (B', N', rows, columns) int32
    num_full: Array  # (B', N', rows) int32
    num_visited: Array  # (B', N', rows) int32: full and partial tiles

    @classmethod
    def of(cls, codes: Array) -> TileList:
        """From codes (B', N', rows, columns)."""
        return cls(
            jnp.argsort(codes, axis=-1, stable=True).astype(jnp.int32),
            (codes == FULL).sum(-1).astype(jnp.int32),
            (codes != EMPTY).sum(-1).astype(jnp.int32),
        )
