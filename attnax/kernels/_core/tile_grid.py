"""Queries and keys in tiles, and the codes of all tiles of a mask at once: a kernel has one program for each tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.tile_codes import PARTIAL, code_of
from attnax.masks import tile_at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = [
    "BoundsAtPositions",
    "TileGrid",
    "tile_codes",
]


class TileGrid(NamedTuple):
    """Queries and keys in tiles."""

    seq_q: int  # without padding; fewer than a tile are padded
    seq_kv: int
    block_q: int
    block_kv: int
    overlaps: bool  # whether the last tile begins earlier, so that it does not pass the end of a longer array

    def q_first(self, i: Any) -> Any:
        """The first query of a tile."""
        return self._first(i, self.block_q, self.seq_q)

    def kv_first(self, j: Any) -> Any:
        """The first key of a tile."""
        return self._first(j, self.block_kv, self.seq_kv)

    def _first(self, n: Any, block: int, length: int) -> Any:
        first = n * block
        return jnp.maximum(0, jnp.minimum(first, length - block)) if self.overlaps and length % block else first

    @property
    def num_q(self) -> int:
        """Tiles along the queries."""
        return -(-self.seq_q // self.block_q)

    @property
    def num_kv(self) -> int:
        """Tiles along the keys."""
        return -(-self.seq_kv // self.block_kv)

    @property
    def even_q(self) -> bool:
        """Whether tiles hold each query once, without padding."""
        return self.seq_q % self.block_q == 0

    @property
    def even_kv(self) -> bool:
        """Whether tiles hold each key once, without padding."""
        return self.seq_kv % self.block_kv == 0

    def ends(self) -> tuple[Array, Array, Array, Array]:
        """First and last query of each tile (1, 1, num_q, 1), first and last key (1, 1, 1, num_kv)."""
        q_first = self.q_first(jnp.arange(self.num_q, dtype=jnp.int32))
        kv_first = self.kv_first(jnp.arange(self.num_kv, dtype=jnp.int32))
        q_last = jnp.minimum(q_first + self.block_q, self.seq_q) - 1
        kv_last = jnp.minimum(kv_first + self.block_kv, self.seq_kv) - 1
        return (
            q_first[None, None, :, None],
            q_last[None, None, :, None],
            kv_first[None, None, None],
            kv_last[None, None, None],
        )


@pytree_dataclass
class BoundsAtPositions:
    """The bounds of a mask that is read at positions; each call computes the range of positions in a tile.

    Without a mask, a query attends every key whose position is not negative.
    """

    of_mask: Lifted | None  # read at ranges of positions
    q_positions: Array  # (B, T)
    kv_positions: Array  # (B, S)

    @property
    def values(self) -> tuple[Array, ...]:
        """The arrays that the bounds depend on."""
        return (*(() if self.of_mask is None else self.of_mask.values), self.q_positions, self.kv_positions)

    def __call__(self, b: Array, h: Array, *ends: Array) -> tuple[Array, Array]:
        """As `Lifted` bounds are called."""
        of_mask = self.of_mask
        tile = None if of_mask is None else lambda b, h, q, kv: of_mask(b, h, *q, *kv)
        positions = self.q_positions, self.kv_positions
        some, every = tile_at_positions(tile, *positions, b, h, (ends[0], ends[1]), (ends[2], ends[3]))
        return some, every


def tile_codes(
    grid: TileGrid,
    batch: int,
    heads: int,
    bounds: Lifted | BoundsAtPositions | None,
    mask: Lifted,
    *,
    is_opaque: bool,
    positions: tuple[Array, Array] | None = None,
) -> Array:
    """FULL, PARTIAL or EMPTY for every tile, (B', N', num_q, num_kv) int32.

    A tile that is not whole is never full. If the bounds of an opaque mask cannot tell, its pairs decide.

    Args:
        grid: of the tiles.
        batch: B.
        heads: N.
        bounds: of the mask; None if the mask has no bounds.
        mask: the mask itself.
        is_opaque: whether pairs must decide where bounds cannot.
        positions: (T,) and (S,), the indices that the mask sees of queries and keys; by default 0, 1, and so on.
    """
    axes = frozenset().union(*map(varying_axes, (*(() if bounds is None else bounds.values), *mask.values)))
    tiles = tuple(vary(x, axes) for x in _all_tiles(grid, batch, heads))
    codes = jnp.full((), PARTIAL, jnp.int32) if bounds is None else code_of(*bounds(*tiles))
    codes = codes.reshape((1,) * (4 - codes.ndim) + codes.shape)
    if is_opaque:
        codes = jnp.where(codes == PARTIAL, _codes_of_pairs(grid, tiles, mask, positions), codes)
    not_whole_q = (jnp.arange(grid.num_q) == grid.num_q - 1) & (not grid.even_q)
    not_whole_kv = (jnp.arange(grid.num_kv) == grid.num_kv - 1) & (not grid.even_kv)
    not_whole = (not_whole_q[:, None] | not_whole_kv[None, :])[None, None]
    return jnp.where(not_whole, jnp.maximum(codes, PARTIAL), codes).astype(jnp.int32)


def _all_tiles(grid: TileGrid, batch: int, heads: int) -> tuple[Array, ...]:
    """(b, h, first and last query, first and last key) of all tiles, along an axis each."""
    b, h = (jnp.arange(count, dtype=jnp.int32) for count in (batch, heads))
    return b[:, None, None, None], h[None, :, None, None], *grid.ends()


def _codes_of_pairs(
    grid: TileGrid,
    tiles: tuple[Array, ...],
    mask: Lifted,
    positions: tuple[Array, Array] | None,
) -> Array:
    """The codes by all pairs, one row of tiles at a time; (B', N', num_q, num_kv)."""
    b, h, q_first, q_last, kv_first, kv_last = tiles
    steps = jnp.arange(grid.block_kv, dtype=jnp.int32)[None]
    kv = jnp.minimum(kv_first.reshape(-1, 1) + steps, kv_last.reshape(-1, 1)).reshape(-1)
    kv = (kv if positions is None else positions[1][kv])[None, None, None]

    def row(ends: tuple[Array, Array]) -> Array:
        q = jnp.minimum(ends[0] + jnp.arange(grid.block_q, dtype=jnp.int32), ends[1])
        q = (q if positions is None else positions[0][q])[None, None, :, None]
        keep = mask(b, h, q, kv)
        keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
        keep = jnp.broadcast_to(keep, (*keep.shape[:2], grid.block_q, kv.size))
        keep = keep.reshape(*keep.shape[:3], grid.num_kv, grid.block_kv)
        return code_of(keep.any((2, 4)), keep.all((2, 4)))

    return jnp.moveaxis(lax.map(row, (q_first.reshape(-1), q_last.reshape(-1))), 0, 2)
