"""The codes of all tiles of a mask at once, and lists of the tiles to visit: a kernel has one program for each tile."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.tile_codes import EMPTY, FULL, PARTIAL, code_of
from attnax.kernels._gpu.tile_sizes import Tile
from attnax.masks import tile_at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = [
    "BoundsAtPositions",
    "TileGrid",
    "TileList",
    "tile_codes",
]


class TileGrid(NamedTuple):
    """Queries and keys in tiles. The last tile begins earlier, so that the tile does not pass the end."""

    seq_q: int  # without padding; fewer than a tile are padded
    seq_kv: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, tile: Tile, seq_q: int, seq_kv: int) -> TileGrid:
        """A grid of such tiles, or of smaller ones for shorter arrays: powers of 2, at least 16."""
        block_q, block_kv = (
            min(most, max(16, 1 << (length - 1).bit_length()))
            for most, length in ((tile.block_q, seq_q), (tile.block_kv, seq_kv))
        )
        return cls(seq_q, seq_kv, block_q, block_kv)

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
        q, kv = (
            (jnp.maximum(jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, length - size), 0), size, length)
            for length, size, count in (
                (self.seq_q, self.block_q, self.num_q),
                (self.seq_kv, self.block_kv, self.num_kv),
            )
        )
        (q_first, q_last), (kv_first, kv_last) = (
            (first, jnp.minimum(first + size, length) - 1) for first, size, length in (q, kv)
        )
        return (
            q_first[None, None, :, None],
            q_last[None, None, :, None],
            kv_first[None, None, None],
            kv_last[None, None, None],
        )


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
