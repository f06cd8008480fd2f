"""A cache before its first token."""

from __future__ import annotations

from typing import Any, ClassVar

from attnax.cache.around import AroundCache
from attnax.cache.layer_cache import CacheCall, Keeps, LayerCache
from attnax.checks import is_concrete
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Int

__all__ = ["EmptyCache"]


@pytree_dataclass
class EmptyCache(AroundCache):
    """A cache without tokens. The type states this, because a traced array cannot.

    The tokens of a prompt attend each other by index, as without a cache, and are stored. A layer returns the inner
    cache, which then holds the tokens.

    Attributes:
        cache: a cache of any kind, without tokens; layers raise ValueError if the cache is known to hold tokens.
    """

    cache: Any
    is_empty: ClassVar[bool] = True

    @property
    def keeps(self) -> Keeps:
        kind: Keeps = getattr(self.cache, "keeps", "tokens")  # `check` refuses an object that is no cache
        return kind

    def check(self, caller: str) -> None:
        """Raises ValueError without an inner cache, or if the inner cache is known to hold tokens."""
        if not isinstance(self.cache, LayerCache) or isinstance(self.cache, EmptyCache):
            raise ValueError(
                f"{caller}: an EmptyCache must hold a cache of one layer; got {type(self.cache).__name__}. "
                "Wrap each of them, tuple(map(EmptyCache, caches))."
            )
        ends = self.cache.next_positions()
        if is_concrete(ends) and ends.max(initial=0) > 0:
            raise ValueError(
                f"{caller}: an EmptyCache must hold no token; got one with {int(ends.max())} in a row. "
                "Give the cache itself."
            )

    def attend(self, call: CacheCall) -> tuple[Array, Any]:
        result: tuple[Array, Any] = self.cache.attend_first(call)
        return result

    attend_first = attend

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> EmptyCache:
        return EmptyCache(self.cache.select_rows(rows))

    def grow(self, max_len: int, num_rows: int) -> EmptyCache:
        return EmptyCache(self.cache.grow(max_len, num_rows))

    def forget(self, first: Int[ArrayLike, "B"]) -> EmptyCache:
        return self  # there is no token
