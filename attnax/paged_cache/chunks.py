"""The pages of a cache in the pieces that attention reads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.cache.chunks import CHUNK, Chunk, Reading
from attnax.paged_cache.pool import Pool, read_blocks
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["PageChunks", "pages_in_chunk"]


@pytree_dataclass
class PageChunks:
    """The pages of rows, in chunks of whole pages."""

    pools: tuple[Pool, Pool]  # of keys and values, (P, K, page, H)
    block_table: Array  # (B, M), the pages of each row; -1 is unused
    lengths: Array  # (B,), the tokens of each row
    needed: Array  # (B, C), the chunks that a row may attend
    order: Array  # (C,), all chunks; the chunks that some row may attend come first
    num_chunks: Array  # the number of chunks that some row may attend

    @classmethod
    def to_read(cls, pools: tuple[Pool, Pool], block_table: Array, lengths: Array, reading: Reading) -> PageChunks:
        """The chunks of all rows, of which only those are read that `reading` may attend."""
        count, page = pages_in_chunk(block_table, pools[0]), pools[0].shape[2]
        size = count * page
        first = jnp.arange(-(-block_table.shape[1] // count), dtype=jnp.int32)[None, None] * size
        needed = first < lengths[:, None, None]
        mask, positions = reading.mask, reading.positions
        if mask is not None and positions.shape[1]:
            present = jnp.where(positions < 0, positions.max(1, keepdims=True), positions)
            q_range = present.min(1)[:, None, None], present.max(1)[:, None, None]
            h = jnp.arange(reading.num_heads, dtype=jnp.int32)[None, :, None]
            some, _ = mask.tile(reading.rows[:, None, None], h, q_range, (first, first + size - 1))
            needed = needed & some
        return cls._of(pools, block_table, lengths, needed.any(1))

    @classmethod
    def _of(cls, pools: tuple[Pool, Pool], block_table: Array, lengths: Array, needed: Array) -> PageChunks:
        some = needed.any(0)
        order, count = jnp.argsort(~some, stable=True), some.sum(dtype=jnp.int32)
        return cls(pools, block_table, lengths, needed, order, count)

    @property
    def chunk_size(self) -> int:
        return pages_in_chunk(self.block_table, self.pools[0]) * self.pools[0].shape[2]

    @property
    def value_shape(self) -> tuple[int, int]:
        _, values = self.pools
        return values.shape[1], values.shape[3]

    @property
    def row_lengths(self) -> Array | None:
        return self.lengths

    def of_rows(self, rows: Array) -> PageChunks:
        return self._of(self.pools, self.block_table[rows], self.lengths[rows], self.needed[rows])

    def chunk(self, n: Array) -> Chunk:
        page, size = self.pools[0].shape[2], self.chunk_size
        count, chunk = size // page, self.order[n]
        missing = -self.block_table.shape[1] % count
        table = jnp.pad(self.block_table, ((0, 0), (0, missing)), constant_values=-1)
        blocks = lax.dynamic_slice_in_dim(table, chunk * count, count, axis=1)
        position = chunk.astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32)
        exists = jnp.repeat(blocks >= 0, page, axis=1) & (position[None] < self.lengths[:, None])

        def read() -> tuple[Array, Array]:
            # Page -1 is masked, so page 0 is read in its place.
            keys, values = (read_blocks(pool, jnp.maximum(blocks, 0)) for pool in self.pools)
            return keys, values

        return Chunk(jnp.broadcast_to(position, exists.shape)[:, None, None], exists[:, None, None], read)


def pages_in_chunk(block_table: Any, pool: Any) -> int:
    """The pages that are read at once."""
    return min(block_table.shape[1], max(1, CHUNK // pool.shape[2]))
