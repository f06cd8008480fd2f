"""A cache in which a row's token at position p lies in slot p % slots, and the first tokens may stay for ever."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnax.cache.layer_cache import (
    InSlots,
    StoredTokens,
    check_new_positions,
    check_new_tokens,
    check_sizes,
    count_new,
    empty_slots,
)
from attnax.checks import is_concrete
from attnax.int8_rows import Int8Rows, encode_rows
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["FEW_QUERIES", "SPARE_SLOTS", "RingKVCache", "init_ring_kv_cache"]

SPARE_SLOTS = 16
"""Slots of a ring beyond its window: the chunk of a draft is written before it is attended, and may be taken back."""
FEW_QUERIES = SPARE_SLOTS + 1
"""The most queries of a step, with a draft; more queries fill the tiles of `flash_attention`."""


@pytree_dataclass
class RingKVCache(InSlots):
    """Keys and values of one layer; a row's token at position p lies in slot p % slots. Padding takes no slot.

    With a window, a new token takes the slot of a token that no later query attends. Without a window, positions end
    with the slots. With sinks, the first `num_sinks` tokens have slots of their own, and the ring is the slots after
    them. Queries then attend the pairs of `sliding_window(window, causal=False) | first(num_sinks)` only.

    Attributes:
        keys: (batch, num_kv_heads, slots, head_dim).
        values: (batch, num_kv_heads, slots, value_head_dim).
        positions: int32 (batch, slots), the position of the token in each slot; -1 is empty.
        overflowed: bool (batch,), whether a token past the slots was dropped; attention then gives NaN.
        window: queries attend keys with |q - kv| < window; None if they attend all.
        num_sinks: with a window, queries attend the first `num_sinks` keys too.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, "B"]
    window: int | None = dataclasses.field(metadata={"static": True})
    num_sinks: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def ring_size(self) -> int:
        """Slots that are written again and again: all but those of the sinks."""
        return self.max_len - self.num_sinks

    def slots_in_use(self) -> Int[Array, ""]:
        return jnp.minimum(self.next_positions().max(initial=0), self.max_len)

    def append(self, new: Mapping[str, Array], positions: ArrayLike) -> tuple[RingKVCache, RingKVCache | StoredTokens]:
        """The cache with the new tokens, and an object with every token that the new tokens may attend.

        Both are the same, unless a new token overwrites a key that an earlier new token attends. The second is then a
        copy of the old slots, followed by the new tokens.

        Raises:
            ValueError: shapes that do not fit the cache; without a window, a position past the slots; with a window,
                positions so far apart that one token overwrites another that is still attended. With traced positions
                the last two cannot be raised: `overflowed` is set for good.
        """
        (batch, slots), num_new, window, size = self.positions.shape, count_new(new), self.window, self.ring_size
        check_new_tokens("RingKVCache.append", self.slots, new, num_new)
        positions = check_new_positions("RingKVCache.append", positions, batch, num_new)
        kept, joins = positions >= 0, window is not None and num_new + window - 1 > size
        last = positions.max(axis=1, initial=-1, keepdims=True)
        if window is None:
            fits, rule = last[:, 0] < slots, f"must be below the number of slots, {slots}, unless there is a window"
        else:  # of two tokens for one slot, the later one stays
            first = jnp.where(kept, positions, last).min(axis=1, initial=jnp.iinfo(jnp.int32).max)
            fits = jnp.full((batch,), joins) | (last[:, 0] - first <= size - window)
            rule = f"of one call must span at most {size - window + 1} positions (slots - num_sinks - window + 1)"
        if is_concrete(fits) and not fits.all():
            raise ValueError(
                f"RingKVCache.append: positions {rule}; got positions up to {int(last.max())} in {num_new} tokens. "
                "Make the cache longer."
            )
        is_sink = positions < self.num_sinks
        kept = kept & (is_sink | (positions > last - size)) & (positions < slots if window is None else True)
        slot = jnp.where(is_sink, positions, self.num_sinks + (positions - self.num_sinks) % size)
        slot = jnp.where(kept, slot, slots)  # one past the end is dropped
        rows = jnp.arange(batch)[:, None]
        held = self.slots
        stored = {name: encode_rows(new[name], like) for name, like in held.items()}
        written = jax.tree.map(lambda x, y: x.at[rows, :, slot].set(y.swapaxes(1, 2), mode="drop"), held, stored)
        cache = dataclasses.replace(
            self,
            **written,
            positions=self.positions.at[rows, slot].set(positions, mode="drop"),
            overflowed=self.overflowed | ~fits,
        )
        if not joins:
            return cache, cache
        joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), held, stored)
        all_positions = jnp.concatenate([self.positions, positions], axis=1)
        return cache, StoredTokens(*self.keys_values(joined), all_positions, window, self.num_sinks)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> RingKVCache:
        cache = super().select_rows(rows)
        return dataclasses.replace(cache, overflowed=self.overflowed[jnp.asarray(rows)])

    def grow(self, max_len: int, num_rows: int) -> RingKVCache:
        return super().grow(max_len, num_rows) if self.window is None else self  # a window needs no more slots

    def forget(self, first: Int[ArrayLike, "B"]) -> RingKVCache:
        """Takes back each row's tokens from position `first` on; their slots are free again.

        With a window, overwritten tokens do not come back. No token is lost if at most slots - num_sinks - window
        tokens are taken back; `overflowed` is set for a row that loses tokens.
        """
        cache = super().forget(first)
        if self.window is None:
            return cache
        first = jnp.maximum(jnp.asarray(first, jnp.int32), 0)
        attended = cache.positions > first[:, None] - self.window  # by the token that comes next
        lost = (attended & (cache.positions >= 0)).sum(1) < jnp.minimum(first, self.window - 1)
        forgets = (self.positions >= first[:, None]).any(1)
        return dataclasses.replace(cache, overflowed=self.overflowed | (forgets & lost))


def init_ring_kv_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: Any = jnp.float32,
    *,
    window: int | None = None,
    num_sinks: int = 0,
    value_head_dim: int | None = None,
) -> RingKVCache:
    """An empty ring of `max_len` slots a row.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        head_dim: size of a key.
        max_len: slots of a row; at least window + num_sinks. With n slots more, chunks of up to n + 1 tokens are
            written before they are attended, which saves a copy, and n tokens can be taken back.
        dtype: as in `init_kv_layer_cache`.
        window: queries attend keys with |q - kv| < window; None if they attend all keys, at most one a slot.
        num_sinks: with a window, the first `num_sinks` tokens of a row are kept, and all queries attend them. A layer
            without `attention_window` takes such a cache, and attends what the cache keeps: it gives the same without
            a cache if the mask of its model hides the rest, as `causal() & (sliding_window(window) |
            first(num_sinks))` does.
        value_head_dim: size of a value.

    Raises:
        ValueError: a size below 1, fewer slots than the window and the sinks take, or sinks without a window.
    """
    if window is not None:
        check_sizes("init_ring_kv_cache", window=window)
    slots = empty_slots("init_ring_kv_cache", batch_size, num_kv_heads, head_dim, value_head_dim, max_len, dtype)
    if num_sinks:
        check_sizes("init_ring_kv_cache", num_sinks=num_sinks)
        if window is None:
            raise ValueError(
                f"init_ring_kv_cache: a ring with sinks must have a window; got num_sinks={num_sinks}, window=None. "
                "Without a window all tokens are kept."
            )
    if window is not None and max_len < window + num_sinks:
        raise ValueError(
            "init_ring_kv_cache: max_len must be at least window + num_sinks; "
            f"got max_len={max_len}, window={window}, num_sinks={num_sinks}."
        )
    return RingKVCache(**slots, overflowed=jnp.zeros((batch_size,), bool), window=window, num_sinks=num_sinks)
