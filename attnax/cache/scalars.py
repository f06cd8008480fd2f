"""Numbers of each stored token, by position, beside a cache of any kind: a score mod reads them as an array."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from attnax.cache.around import AroundCache
from attnax.cache.layer_cache import CacheCall, Keeps, LayerCache, check_sizes, nan_where_lost
from attnax.checks import is_concrete
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["ScalarCache", "ScalarSlots", "init_scalar_cache"]


@dataclasses.dataclass(frozen=True)
class ScalarSlots:
    """The slot of each position: its own, or behind a window one of a ring after the slots of the sinks.

    Attributes:
        size: slots.
        is_ring: a later token takes the slot of an earlier one.
        num_sinks: the first slots of a ring, which keep their tokens.
    """

    size: int
    is_ring: bool = False
    num_sinks: int = 0

    @property
    def ring_size(self) -> int:
        """Slots that are written again and again, or all slots."""
        return self.size - self.num_sinks

    def __call__(self, position: Any) -> Any:
        """The slots of positions, as an array of their shape; padding has the slot of position 0."""
        position = jnp.maximum(position, 0)
        if not self.is_ring:
            return position
        turned = self.num_sinks + (position - self.num_sinks) % self.ring_size
        return jnp.where(position < self.num_sinks, position, turned) if self.num_sinks else turned


@pytree_dataclass
class ScalarCache(AroundCache):
    """A cache of tokens, and numbers of each token by its position: those of `MultiHeadAttention(token_scalars=...)`.

    The layer writes the numbers by `write` before `attend` appends the tokens.

    Attributes:
        cache: a cache of one layer that stores tokens.
        scalars: (batch, heads, P), float32 or wider. The numbers of the token at position p lie in slot p. Behind a
            window they lie in slot p % P, after the slots of the cache's sinks.
        overflowed: bool (batch,), whether a token had no slot, or tokens were taken back to a position that attends
            numbers which are gone; attention then gives NaN.
        lost: int32 (batch,). Behind a window, the numbers of positions below are gone, but for the sinks.
    """

    cache: Any
    scalars: Float[Array, "B n P"]
    overflowed: Bool[Array, "B"]
    lost: Int[Array, "B"]
    keeps: ClassVar[Keeps] = "tokens"

    @property
    def is_empty(self) -> bool:
        """As in `LayerCache`."""
        return bool(self.cache.is_empty)

    @property
    def num_positions(self) -> int | None:
        """Of the inner cache."""
        count: int | None = getattr(self.cache, "num_positions", None)
        return count

    @property
    def slots(self) -> ScalarSlots:
        """Where the numbers lie."""
        return ScalarSlots(self.scalars.shape[2], self.window is not None, self.num_sinks)

    def last(self) -> Float[Array, "B n"]:
        """The numbers of each row's last token; 0 in a row without tokens."""
        end = self.cache.next_positions() - 1
        found = jnp.take_along_axis(self.scalars, self.slots(end)[:, None, None], axis=2)[..., 0]
        return jnp.where(end[:, None] >= 0, found, 0)

    def write(
        self, scalars: Float[Array, "B n T"], positions: Int[Array, "#B T"], *, is_first: bool = False
    ) -> ScalarCache:
        """The cache with the numbers of new tokens.

        Args:
            scalars: (batch, heads, T).
            positions: (1, T) or (batch, T), as in `append` of the inner cache; -1 is padding.
            is_first: the tokens attend each other by index, so that only the last ones need slots.

        Raises:
            ValueError: positions past the slots; behind a window, positions so far apart that one token takes the slot
                of another that is still attended. With traced positions `overflowed` is set for good.
        """
        slots, batch = self.slots, self.scalars.shape[0]
        positions = jnp.broadcast_to(positions, (batch, positions.shape[1]))
        real = positions >= 0
        last = positions.max(axis=1, initial=-1, keepdims=True)
        kept, fits, lost = real & (positions < slots.size), last[:, 0] < slots.size, self.lost
        if self.window is not None:
            first = jnp.where(real, positions, last).min(axis=1, initial=jnp.iinfo(jnp.int32).max)
            kept = real & ((positions < slots.num_sinks) | (positions > last - slots.ring_size))
            fits = fits | (last[:, 0] - first + self.window <= slots.ring_size) | is_first
            lost = jnp.maximum(lost, last[:, 0] + 1 - slots.ring_size)
        if is_concrete(fits) and not fits.all():
            behind = "" if self.window is None else f" and a window of {self.window}"
            raise ValueError(
                f"ScalarCache: the numbers of all attended tokens must fit into its slots; got positions up to "
                f"{int(last.max())} in {positions.shape[1]} tokens, with {slots.size} slots{behind}. Make it with more "
                "slots, init_scalar_cache(..., num_positions=...)."
            )
        slot = jnp.where(kept, slots(positions), slots.size)  # one past the end is dropped
        new = scalars.swapaxes(1, 2).astype(self.scalars.dtype)
        written = self.scalars.at[jnp.arange(batch)[:, None], :, slot].set(new, mode="drop")
        return ScalarCache(self.cache, written, self.overflowed | ~fits, lost)

    def check(self, caller: str) -> None:
        """As in `LayerCache`, and ValueError unless there is an inner cache that stores tokens."""
        if not isinstance(self.cache, LayerCache) or self.cache.is_empty or self.cache.keeps != "tokens":
            raise ValueError(
                f"{caller}: a ScalarCache must hold a cache of one layer that stores tokens; got "
                f"{type(self.cache).__name__}. Put an EmptyCache around the ScalarCache."
            )
        self.cache.check(caller)

    def attend(self, call: CacheCall) -> tuple[Array, ScalarCache]:
        """As in `LayerCache`; the numbers of the new tokens are written already."""
        out, cache = self.cache.attend(call)
        return nan_where_lost(out, self), dataclasses.replace(self, cache=cache)

    def attend_first(self, call: CacheCall) -> tuple[Array, ScalarCache]:
        """As in `LayerCache`."""
        out, cache = self.cache.attend_first(call)
        return nan_where_lost(out, self), dataclasses.replace(self, cache=cache)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> ScalarCache:
        """As in `LayerCache`."""
        cache, rows = self.cache.select_rows(rows), jnp.asarray(rows)
        return ScalarCache(cache, self.scalars[rows], self.overflowed[rows], self.lost[rows])

    def forget(self, first: Int[ArrayLike, "B"]) -> ScalarCache:
        """As in `LayerCache`; the numbers of forgotten tokens stay until their slots are written again.

        Behind a window, the slots hold what the next token attends if at most slots - sinks - window tokens are taken
        back; `overflowed` is set for a row that lacks some of it.
        """
        cache = self.cache.forget(first)
        if self.window is None:
            return dataclasses.replace(self, cache=cache)
        first = jnp.maximum(jnp.asarray(first, jnp.int32), 0)
        oldest = jnp.maximum(first - max(self.window - 1, 1), self.num_sinks)  # running sums go on from the last token
        lacks = (cache.next_positions() < self.cache.next_positions()) & (oldest < jnp.minimum(self.lost, first))
        return ScalarCache(cache, self.scalars, self.overflowed | lacks, jnp.minimum(self.lost, first))

    def grow(self, max_len: int, num_rows: int) -> ScalarCache:
        """As in `LayerCache`."""
        old, new = self.slots, dataclasses.replace(self.slots, size=max(max_len, self.slots.size))
        scalars = self.scalars
        if new != old and not old.is_ring:
            scalars = jnp.pad(scalars, ((0, 0), (0, 0), (0, new.size - old.size)))
        elif new != old:  # each slot of the longer ring gets the last position that has it, if the old ring held that
            slot = jnp.arange(new.size, dtype=jnp.int32)[None]
            end = (self.cache.next_positions() - 1)[:, None]
            turned = end - (end - slot) % new.ring_size
            held = (turned >= new.num_sinks) & (turned > end - old.ring_size)
            source = jnp.where(slot < new.num_sinks, slot, old(jnp.where(held, turned, 0)))
            held = held | (slot < new.num_sinks)
            scalars = jnp.where(held[:, None], jnp.take_along_axis(scalars, source[:, None], axis=2), 0)
        return dataclasses.replace(self, cache=self.cache.grow(max_len, num_rows), scalars=scalars)


def init_scalar_cache(
    cache: Any, num_heads: int, *, num_positions: int | None = None, dtype: Any = jnp.float32
) -> ScalarCache:
    """An empty cache with room for the numbers of its tokens, for a layer with `token_scalars`.

    Args:
        cache: an empty cache that stores tokens, of any kind; an EmptyCache goes around the result.
        num_heads: heads of the numbers: the layer's num_heads, or 1.
        num_positions: slots, by default the `max_len` of the cache. A cache with a window needs as many as the window
            and the tokens of a call together, and no more for a longer text; with more, tokens can be taken back.
        dtype: of the numbers.

    Raises:
        ValueError: a cache that stores no tokens, or a size below 1.

    Example:
        >>> from attnax.cache import init_kv_layer_cache, init_scalar_cache
        >>> init_scalar_cache(init_kv_layer_cache(2, 3, 5, max_len=7), num_heads=6).scalars.shape
        (2, 6, 7)
    """
    size: Any = getattr(cache, "max_len", None) if num_positions is None else num_positions
    check_sizes("init_scalar_cache", num_heads=num_heads, num_positions=size)
    rows = cache.next_positions().shape[0]
    scalars, lost = jnp.zeros((rows, num_heads, size), dtype), jnp.zeros((rows,), jnp.int32)
    made = ScalarCache(cache, scalars, jnp.zeros((rows,), bool), lost)
    made.check("init_scalar_cache")
    return made
