"""The order in which the programs of a TPU kernel visit tiles.

A TPU runs the programs of a grid one after another, and copies the blocks of the next program while the current one
computes. A block that stays the same is not copied again. So a kernel visits only the tiles that hold allowed pairs: a
list in scalar memory, which index maps can read, has one word for each visited tile. The tiles of one row of the list
follow each other, and their sums stay in vector memory.

The grid is (B, outer heads, words, inner heads): inner heads share a tile of keys, or the sums of a tile of keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from attnax.kernels._core.tile import TilePlace
from attnax.kernels._core.tile_codes import EMPTY, FULL, PARTIAL
from attnax.typing import Array

__all__ = ["Step", "Walk", "walk_of"]

_IDLE = 2  # the kind of a word behind the last tile of a row or head that has fewer tiles than others


class Step(NamedTuple):
    """One program of a kernel."""

    place: TilePlace
    inner: Any  # the number of the head among those that take turns
    is_full: Any
    is_partial: Any
    is_first: Any  # of the row's tiles
    is_last: Any


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the words of a list are read.

    A word is the number of a tile (row * columns + column), its kind (FULL, PARTIAL or idle) in 2 bits, and whether it
    is the first and the last tile of its row.
    """

    list_shape: tuple[int, int, int]  # (B | 1, outer heads | 1, most words)
    columns: int  # tiles in a row of the list
    inner: int  # heads that take turns at each tile
    turned: bool  # rows of the list are tiles of keys

    def head(self, outer: Any, inner: Any) -> Any:
        """The query head of a program."""
        return outer * self.inner + inner

    def word(self, words: Any, b: Any, outer: Any, n: Any) -> Any:
        """The word of a program."""
        rows, heads, most = self.list_shape
        row = b if rows > 1 else 0
        return words[(row * heads + (outer if heads > 1 else 0)) * most + n]

    def tile(self, words: Any, b: Any, outer: Any, n: Any) -> tuple[Any, Any]:
        """(i, j), the tile of queries and of keys of a program."""
        tile = self.word(words, b, outer, n) >> 4
        row, column = tile // self.columns, tile % self.columns
        return (column, row) if self.turned else (row, column)

    def step(self, words: Any, b: Any, outer: Any, n: Any, inner: Any) -> Step:
        """All that a program knows of its place."""
        word = self.word(words, b, outer, n)
        place = TilePlace(b, self.head(outer, inner), *self.tile(words, b, outer, n), self.turned)
        kind = (word >> 2) & 3
        return Step(place, inner, kind == FULL, kind == PARTIAL, (word & 2) != 0, (word & 1) != 0)


def walk_of(codes: Array, outer: int, inner: int, *, turned: bool) -> tuple[Walk, Array, Array]:
    """(walk, its words int32, the number of words that a grid needs, int32).

    A row without any allowed pair visits one tile, so that its results are written.

    Args:
        codes: of all tiles, (B | 1, N | 1, num_q, num_kv).
        outer: outer heads of the grid.
        inner: heads that take turns.
        turned: whether rows of the list are tiles of keys.
    """
    if inner > 1 and codes.shape[1] > 1:  # a tile is visited if any of the heads needs it
        codes = codes.reshape(codes.shape[0], outer, inner, *codes.shape[2:])
        codes = jnp.where((codes == codes[:, :, :1]).all(2), codes[:, :, 0], PARTIAL)
    codes = codes.swapaxes(2, 3) if turned else codes
    batch, heads, rows, columns = codes.shape
    visited = codes != EMPTY
    visited |= ~visited.any(-1, keepdims=True) & (jnp.arange(columns) == 0)[None, None, None]
    is_first = visited & (visited.cumsum(-1) == 1)
    is_last = visited & (visited[..., ::-1].cumsum(-1)[..., ::-1] == 1)
    number = jnp.arange(rows * columns, dtype=jnp.int32).reshape(rows, columns)
    kind = jnp.where(codes == FULL, FULL, PARTIAL)
    words = (number[None, None] << 4) | (kind << 2) | (is_first.astype(jnp.int32) << 1) | is_last.astype(jnp.int32)
    words, visited = words.reshape(batch, heads, -1), visited.reshape(batch, heads, -1)
    order = jnp.argsort(~visited, axis=-1, stable=True)
    words, count = jnp.take_along_axis(words, order, -1), visited.sum(-1, keepdims=True, dtype=jnp.int32)
    last = jnp.take_along_axis(words, count - 1, -1)
    idle = (last & ~15) | (_IDLE << 2)  # the blocks of the last tile are there already
    words = jnp.where(jnp.arange(rows * columns)[None, None] < count, words, idle)
    walk = Walk((batch, heads, rows * columns), columns, inner, turned)
    return walk, words.reshape(-1).astype(jnp.int32), count.max()
