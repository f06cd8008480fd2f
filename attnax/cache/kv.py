"""A cache whose tokens lie in the order in which they were written, padding included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache.layer_cache import InSlots, check_new_positions, check_new_tokens, count_new, empty_slots
from attnax.checks import check_shape, is_concrete
from attnax.int8_rows import Int8Rows, Rows, encode_rows
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["KVLayerCache", "init_kv_layer_cache", "update_kv_layer_cache"]


@pytree_dataclass
class KVLayerCache(InSlots):
    """Keys and values of one attention layer; keys are stored after their rotation.

    Attributes:
        keys: (batch, num_kv_heads, max_len, head_dim).
        values: (batch, num_kv_heads, max_len, value_head_dim).
        length: int32 scalar, the slots written so far, the same for every row. Padding takes slots too, but not behind
            the last token of all rows.
        positions: int32 (batch, max_len), the index of each slot's token within its row's own text; -1 is empty or
            padding.
        overflowed: whether a write beyond max_len was ever dropped; attention then gives NaN.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    length: Int[Array, ""]
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, ""]

    def slots_in_use(self) -> Int[Array, ""]:
        return self.length

    def forget(self, first: Int[ArrayLike, "B"]) -> KVLayerCache:
        """Takes back each row's tokens from position `first` on; slots behind the last token of all rows are free."""
        cache = super().forget(first)
        held = (cache.positions >= 0).any(0)
        end = jnp.where(held, jnp.arange(1, self.max_len + 1, dtype=jnp.int32), 0).max()
        return dataclasses.replace(cache, length=jnp.minimum(self.length, end))

    def append(self, new: Mapping[str, Array], positions: ArrayLike) -> tuple[KVLayerCache, KVLayerCache]:
        """The cache with the new tokens, twice: the cache holds every token that the new tokens may attend."""
        cache = _write("KVLayerCache.append", self, new, None, positions)
        return cache, cache

    def store(self, new: Mapping[str, Array], positions: ArrayLike) -> KVLayerCache:
        """`append` from the first slot on; padding behind the last token of all rows takes no slot."""
        empty = dataclasses.replace(self, length=jnp.zeros_like(self.length))  # rows may have been left out
        return _write("KVLayerCache.store", empty, new, 0, positions)


def init_kv_layer_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: Any = jnp.float32,
    *,
    value_head_dim: int | None = None,
) -> KVLayerCache:
    """An empty cache for `max_len` tokens a row.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        head_dim: size of a key.
        max_len: tokens of a row.
        dtype: of keys and values; int8 stores 8-bit integers with a float32 scale for each head of each token.
        value_head_dim: size of a value, by default `head_dim`.

    Raises:
        ValueError: a size below 1.
    """
    slots = empty_slots("init_kv_layer_cache", batch_size, num_kv_heads, head_dim, value_head_dim, max_len, dtype)
    return KVLayerCache(**slots, length=jnp.zeros((), jnp.int32), overflowed=jnp.zeros((), bool))


def update_kv_layer_cache(
    cache: KVLayerCache,
    keys_new: Float[Array, "B K T H"],
    values_new: Float[Array, "B K T Hv"],
    start: int | Int[ArrayLike, ""] | None = None,
    *,
    positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
) -> KVLayerCache:
    """Writes T tokens into slots start ... start + T - 1; padding behind the last token of all rows takes no slot.

    Args:
        cache: stays as it is; the result is a new one (donate the old one under jit to write in place).
        keys_new: (batch, num_kv_heads, T, head_dim).
        values_new: (batch, num_kv_heads, T, value_head_dim).
        start: first slot, by default `cache.length`.
        positions: (T,) or (batch, T), each token's index within its row's text, -1 for padding; by default the slot
            numbers.

    Raises:
        ValueError: shapes that do not fit the cache, or more tokens than fit. With a traced `start` a
            lack of room raises no error: no token is written, and `overflowed` is set for good.
    """
    new = {"keys": keys_new, "values": values_new}
    return _write("update_kv_layer_cache", cache, new, start, positions, suffix="_new")


def _write(
    caller: str,
    cache: KVLayerCache,
    new: Mapping[str, Array],
    start: Any,
    positions: ArrayLike | None,
    suffix: str = "",
) -> KVLayerCache:
    """`update_kv_layer_cache` for arrays of any names."""
    (batch, max_len), num_new = cache.positions.shape, count_new(new)
    check_new_tokens(caller, cache.slots, new, num_new, suffix)
    if start is not None:
        check_shape(caller, "start", start, (), integers=True)
    may_shift = num_new > 1 and not (isinstance(start, int) and start == 0)
    start = cache.length if start is None else jnp.asarray(start, jnp.int32)
    index = jnp.arange(num_new, dtype=jnp.int32)
    positions = start + index if positions is None else positions
    positions = check_new_positions(caller, positions, batch, num_new)
    num_taken = jnp.where((positions >= 0).any(0), index + 1, 0).max(initial=0)
    fits = (start >= 0) & (start + num_taken <= max_len)
    if is_concrete(fits) and not fits:
        raise ValueError(
            f"{caller}: {int(num_taken)} tokens from slot {int(start)} do not fit into a cache of "
            f"max_len={max_len}. Make the cache longer."
        )
    size = min(num_new, max_len)
    first = jnp.clip(start, 0, max_len - size)
    shift = start - first  # above 0 where the slots of the last padding do not exist
    taken = fits & (index[:size] >= shift) & (index[:size] < shift + num_taken)

    def write(buffer: Array, new: Array, axis: int) -> Array:
        # What does not fit puts the old tokens back: cheaper than a choice between two whole caches.
        old = lax.dynamic_slice_in_dim(buffer, first, size, axis)
        new = lax.slice_in_dim(new, 0, size, axis=axis)
        new = jnp.roll(new, shift, axis) if may_shift else new
        where = taken.reshape(*(1,) * axis, size, *(1,) * (new.ndim - axis - 1))
        return lax.dynamic_update_slice_in_dim(buffer, jnp.where(where, new, old), first, axis)

    def write_rows(held: Rows, new: Array) -> Rows:
        return jax.tree.map(lambda buffer, part: write(buffer, part, 2), held, encode_rows(new, held))

    return dataclasses.replace(
        cache,
        **{name: write_rows(held, new[name]) for name, held in cache.slots.items()},
        length=jnp.where(fits, jnp.maximum(cache.length, start + num_taken), cache.length),
        positions=write(cache.positions, positions, 1),
        overflowed=cache.overflowed | ~fits,
    )
