"""Stored tokens as the engines of decoding read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["Chunk", "Source", "TokenArrays", "chunk_slots"]


class Chunk(NamedTuple):
    """Some tokens of every row."""

    position: Array  # (B, 1, 1, S)
    exists: Array  # (B, 1, 1, S); a slot without a token is masked, whatever it holds
    read: Callable[[], tuple[Array, Array]]  # () -> (B, K, S, H), (B, K, S, V)


@runtime_checkable
class Source(Protocol):
    """Stored tokens of B rows, a pytree."""

    @property
    def num_chunks(self) -> Array:
        """How many chunks to read.

        A traced number: JAX could differentiate a loop of known length in reverse, but without the contract for NaN.
        """

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """(K, V)."""

    def chunk(self, n: Array) -> Chunk:
        """The chunk that is read as number n."""


@pytree_dataclass
class TokenArrays:
    """All stored tokens as arrays: in one piece (B, K, S, H), or in pages (P, page, K, H)."""

    keys: Array
    values: Array
    positions: Array  # (B, S) int32; -1 is no token
    block_table: Array | None  # (B, S / page) int32, the pages of each row; None for tokens in one piece


def chunk_slots(n: Any, size: int, length: int) -> tuple[Array, Array]:
    """The slots (size,) of chunk n, and which of them (size,) no chunk before it holds.

    The last chunk starts early enough to end at `length`, as `lax.dynamic_slice` would start it.
    """
    start = jnp.asarray(n, jnp.int32) * size
    slots = jnp.minimum(start, length - size) + jnp.arange(size, dtype=jnp.int32)
    return slots, slots >= start
