"""Stored tokens in the pieces that attention reads: a kind of cache states here what kernels need to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from attnax.int8_rows import decode_rows
from attnax.masks import Mask
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["CHUNK", "Chunk", "Reading", "SlotChunks", "Source", "TokenArrays"]

CHUNK = 128
"""The number of stored tokens that are read at once, about."""


class Reading(NamedTuple):
    """The queries that read a cache, by which a cache chooses what is read.

    Attributes:
        mask: at positions; None if all tokens may be attended.
        rows: (B,), the rows of the batch as masks see them.
        positions: (B, T) of the queries; a negative position is padding.
        num_heads: of the queries.
    """

    mask: Mask | None
    rows: Array
    positions: Array
    num_heads: int


class Chunk(NamedTuple):
    """Some tokens of every row."""

    position: Array  # (B, 1, 1, S)
    exists: Array  # (B, 1, 1, S); a slot without a token is masked, with any contents
    read: Callable[[], tuple[Array, Array]]  # () -> (B, K, S, H), (B, K, S, V)


@runtime_checkable
class Source(Protocol):
    """Stored tokens of B rows, a pytree."""

    @property
    def num_chunks(self) -> Array:
        """The number of chunks to read.

        The number is traced: JAX would differentiate a loop of known length in reverse, without the contract for NaN.
        """

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """(K, V)."""

    @property
    def row_lengths(self) -> Array | None:
        """(B,), about how many tokens are read of each row; None if all rows have the same chunks."""

    def of_rows(self, rows: Array) -> Source:
        """The tokens of the rows `rows` (R,)."""

    def chunk(self, n: Array) -> Chunk:
        """The n-th chunk in the order of reading."""


@pytree_dataclass
class TokenArrays:
    """All stored tokens as arrays: in one piece (B, K, S, H), or in pages (P, K, page, H)."""

    keys: Array
    values: Array
    positions: Array  # (B, S) int32; -1 is no token
    block_table: Array | None  # (B, S / page) int32, the pages of each row; None for tokens in one piece


@pytree_dataclass
class SlotChunks:
    """Chunks of tokens that lie in the slots of a cache; slots from `in_use` on hold no token."""

    cache: Any  # an `InSlots`
    in_use: Array

    @property
    def chunk_size(self) -> int:
        return min(self.cache.positions.shape[1], CHUNK)

    @property
    def num_chunks(self) -> Array:
        return -(-self.in_use // max(1, self.chunk_size))

    @property
    def value_shape(self) -> tuple[int, int]:
        _, values = jax.eval_shape(lambda cache: cache.keys_values(cache.slots), self.cache)
        return values.shape[1], values.shape[3]

    @property
    def row_lengths(self) -> Array | None:
        return None

    def of_rows(self, rows: Array) -> SlotChunks:
        return dataclasses.replace(self, cache=self.cache.select_rows(rows))

    def chunk(self, n: Array) -> Chunk:
        cache, size, length = self.cache, self.chunk_size, self.cache.positions.shape[1]
        start = jnp.asarray(n, jnp.int32) * size
        # The last chunk ends at `length`, so the last chunk may overlap the chunk before.
        first = jnp.minimum(start, length - size)

        def cut(x: Array, axis: int) -> Array:
            return x if size == length else lax.dynamic_slice_in_dim(x, first, size, axis)

        def read() -> tuple[Array, Array]:
            keys, values = cache.keys_values(jax.tree.map(lambda x: cut(x, 2), cache.slots))
            return decode_rows(keys, keys.dtype), decode_rows(values, values.dtype)

        position, is_new = cut(cache.positions, 1), first + jnp.arange(size, dtype=jnp.int32) >= start
        exists = (position >= 0) & is_new[None]
        return Chunk(jnp.maximum(position, 0)[:, None, None], exists[:, None, None], read)
