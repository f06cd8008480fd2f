"""Stored tokens as the engines of decoding read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["Chunk", "Source", "Stored"]


class Chunk(NamedTuple):
    """Some tokens of every row."""

    position: Array  # (B, 1, 1, S)
    exists: Array  # (B, 1, 1, S): slots without a token are masked, whatever they hold
    read: Callable[[], tuple[Array, Array]]  # () -> (B, K, S, H), (B, K, S, V)


@runtime_checkable
class Source(Protocol):
    """Stored tokens of B rows, a pytree."""

    @property
    def num_chunks(self) -> Array:
        """How many chunks to read.

        Loops of known length could be differentiated in reverse, but not with the care that NaN needs.
        """

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """(K, V)."""

    def chunk(self, n: Array) -> Chunk:
        """The chunk to be read as number n."""


@pytree_dataclass
class Stored:
    """Tokens in one piece (B, K, S, H), or in pages (P, page, K, H) that a table names."""

    keys: Array
    values: Array
    positions: Array  # (B, S) int32; -1 is no token
    pages: Array | None  # (B, S / page) int32
