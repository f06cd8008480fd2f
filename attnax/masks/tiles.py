"""How many tiles a mask empties, cuts and fills."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["TileCounts", "count_tiles"]


class TileCounts(NamedTuple):
    """Numbers of tiles in which a mask allows nothing (kernels skip them), a part, and everything."""

    empty: int
    partial: int
    full: int

    @property
    def skipped(self) -> float:
        """Fraction of the tiles that is never computed."""
        return self.empty / sum(self)


def count_tiles(keep: np.ndarray, tile: tuple[int, int]) -> tuple[TileCounts, np.ndarray, np.ndarray]:
    """The tiles of a mask array (T, S), cut into tiles of (queries, keys) from the first pair on.

    Returns:
        The counts, and two boolean arrays (tiles of queries, tiles of keys): which tiles are empty and which are full.
    """
    starts = [np.arange(0, length, size) for length, size in zip(keep.shape, tile, strict=True)]
    sizes = [np.diff(first, append=length) for first, length in zip(starts, keep.shape, strict=True)]
    allowed = np.add.reduceat(np.add.reduceat(keep, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    empty, full = allowed == 0, allowed == np.multiply.outer(*sizes)
    return TileCounts(int(empty.sum()), int((~empty & ~full).sum()), int(full.sum())), empty, full
