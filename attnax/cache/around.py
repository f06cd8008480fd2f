"""What a cache around another one hands on to it."""

from __future__ import annotations

from typing import Any

from attnax.cache.layer_cache import StoredTokens
from attnax.typing import Array, Int

__all__ = ["AroundCache"]


class AroundCache:
    """The base of a LayerCache whose tokens are those of an inner cache.

    Attributes:
        cache: the inner cache.
    """

    cache: Any

    @property
    def window(self) -> int | None:
        """Of the inner cache."""
        window: int | None = getattr(self.cache, "window", None)
        return window

    @property
    def num_sinks(self) -> int:
        """Of the inner cache."""
        num_sinks: int = getattr(self.cache, "num_sinks", 0)
        return num_sinks

    def tokens(self, dtype: Any) -> StoredTokens:
        """As in `LayerCache`."""
        stored: StoredTokens = self.cache.tokens(dtype)
        return stored

    def next_positions(self) -> Int[Array, "B"]:
        """As in `LayerCache`."""
        return self.cache.next_positions()

    def slots_in_use(self) -> Int[Array, ""]:
        """As in `LayerCache`."""
        slots: Array = self.cache.slots_in_use()
        return slots
