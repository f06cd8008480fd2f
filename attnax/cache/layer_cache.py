"""The protocol of a layer's cache, and the operations on every cache of a pytree."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from attnax.checks import check_positions, check_shape, is_concrete
from attnax.int8_rows import Int8Rows, Rows, decode_rows, zero_rows
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["InSlots", "LayerCache", "StoredTokens", "check_rows", "forget", "select_rows"]

Caches = TypeVar("Caches")
Slots = TypeVar("Slots", bound=Any)


@pytree_dataclass
class StoredTokens:
    """Tokens in one piece, in any order.

    Attributes:
        keys: (batch, num_kv_heads, S, head_dim), rotated.
        values: (batch, num_kv_heads, S, value_head_dim).
        positions: int32 (batch, S); -1 is no token.
        window: queries attend keys with |q - kv| < window; None if they attend all.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    positions: Int[Array, "B S"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def slots_in_use(self) -> Int[Array, ""]:
        """The end of the slots in use; no later slot holds a token."""
        return jnp.int32(self.positions.shape[1])

    @property
    def num_positions(self) -> int | None:
        """The number of positions that a mask array must cover; None if there is no bound."""
        return None

    @property
    def overflowed(self) -> Bool[Array, ""]:
        """False: no write was dropped."""
        return jnp.zeros((), bool)

    def tokens(self, dtype: Any) -> StoredTokens:
        """The tokens, with keys and values as arrays of `dtype`."""
        keys, values = decode_rows(self.keys, dtype), decode_rows(self.values, dtype)
        return dataclasses.replace(self, keys=keys, values=values)


@runtime_checkable
class LayerCache(Protocol):
    """The methods of every cache of one layer. No cache changes in place.

    Each kind stores keys and values in its own layout and dtype; `tokens` reads every kind. A kind with tokens in slots
    derives from `InSlots`, which states the members that softmax attention reads. `PagedKVCache` has no slots, but has
    `append`, `num_positions` and `overflowed`.
    """

    def tokens(self, dtype: Any) -> StoredTokens:
        """The tokens as arrays (batch, num_kv_heads, S, head_dim) of `dtype` with their positions, in any order.

        Raises:
            NotImplementedError: the cache stores no tokens.
        """

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> Any:
        """A cache of the rows `rows`: in any order, also repeated or left out."""

    def forget(self, first: Int[ArrayLike, "B"]) -> Any:
        """Takes back each row's tokens from position `first` on."""


def select_rows(caches: Caches, rows: Int[ArrayLike, "R"]) -> Caches:
    """`rows` of every cache in a pytree, and of all other arrays of the pytree along axis 0."""

    def select(node: Any) -> Any:
        return node.select_rows(rows) if isinstance(node, LayerCache) else node[rows]

    return jax.tree.map(select, caches, is_leaf=lambda node: isinstance(node, LayerCache))


def forget(caches: Caches, first: Int[ArrayLike, "B"]) -> Caches:
    """Takes back each row's tokens from position `first` on, in every cache of a pytree."""
    return jax.tree.map(lambda cache: cache.forget(first), caches, is_leaf=lambda node: isinstance(node, LayerCache))


class InSlots:
    """The base of a LayerCache whose tokens lie in slots, each with its position. `cached_attention` takes any kind.

    A kind has these fields, and defines `append`.

    Attributes:
        keys: (batch, num_kv_heads, slots, head_dim).
        values: (batch, num_kv_heads, slots, value_head_dim).
        positions: int32 (batch, slots); -1 is empty or padding.
        overflowed: bool, () or (batch,), whether a write was dropped; attention then gives NaN.
        window: queries attend keys with |q - kv| < window; None if they attend all.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, "..."]
    window: int | None = None

    def append(self, keys: Array, values: Array, positions: ArrayLike) -> tuple[Any, Any]:
        """Returns (new cache, the tokens that the new tokens attend).

        The second result is the new cache, or a StoredTokens if the write loses a token that is still attended.
        """
        raise NotImplementedError(f"{type(self).__name__}: a cache that stores tokens needs an append method.")

    @property
    def num_positions(self) -> int | None:
        """The number of positions that a mask array must cover; None if there is no bound."""
        return self.max_len if self.window is None else None

    @property
    def slots_in_use(self) -> Int[Array, ""]:
        """The end of the slots in use; no later slot holds a token."""
        return jnp.int32(self.max_len)

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.keys.shape[2]

    def next_positions(self) -> Int[Array, "B"]:
        return self.positions.max(axis=1, initial=-1) + 1

    def tokens(self: Any, dtype: Any) -> StoredTokens:
        """All slots, as arrays of `dtype`."""
        return StoredTokens(self.keys, self.values, self.positions, self.window).tokens(dtype)

    def select_rows(self: Slots, rows: Int[ArrayLike, "R"]) -> Slots:
        rows = check_rows("select_rows", rows, self.positions.shape[0])
        keys, values, positions = jax.tree.map(lambda x: x[rows], (self.keys, self.values, self.positions))
        return dataclasses.replace(self, keys=keys, values=values, positions=positions)

    def forget(self: Slots, first: Int[ArrayLike, "B"]) -> Slots:
        """Takes back each row's tokens from position `first` on, by marking their slots as empty."""
        check_shape("forget", "first", first, self.positions.shape[:1], integers=True)
        first = jnp.asarray(first, jnp.int32)
        return dataclasses.replace(self, positions=jnp.where(self.positions < first[:, None], self.positions, -1))


def empty_slots(
    caller: str, batch_size: int, num_kv_heads: int, head_dim: int, value_head_dim: int | None, max_len: int, dtype: Any
) -> dict[str, Any]:
    """The fields of `InSlots` for `max_len` empty slots a row; raises ValueError for a size below 1."""
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check_sizes(caller, **sizes, value_head_dim=value_head_dim, max_len=max_len)
    return {
        "keys": zero_rows((batch_size, num_kv_heads, max_len, head_dim), dtype),
        "values": zero_rows((batch_size, num_kv_heads, max_len, value_head_dim), dtype),
        "positions": jnp.full((batch_size, max_len), -1, jnp.int32),
    }


def check_rows(caller: str, rows: Int[ArrayLike, "R"], batch: int) -> Array:
    """`rows` as an array; ValueError unless they are integers in one axis, and known ones lie within the batch."""
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"{caller}: rows must be integers in one axis; got shape={rows.shape}, dtype={rows.dtype}.")
    if is_concrete(rows) and ((rows < 0) | (rows >= batch)).any():
        raise ValueError(f"{caller}: rows must be at least 0 and below {batch}; got rows={rows.tolist()}.")
    return rows


def check_sizes(caller: str, **sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{caller}: {name} must be at least 1; got {name}={size}.")


def check_new_tokens(
    caller: str,
    held: tuple[Rows, Rows],
    keys: ArrayLike,
    values: ArrayLike,
    leading: tuple[int, ...],
    axes: str = "(batch, num_kv_heads, new tokens, size)",
) -> None:
    """Raises ValueError unless the new keys and values have the `leading` axes, and the sizes of `held`."""
    for name, new, like in (("keys_new", keys, held[0]), ("values_new", values, held[1])):
        want = (*leading, like.shape[3])
        if new.shape != want:
            raise ValueError(f"{caller}: {name} must have shape {axes}={want}; got {name}.shape={new.shape}.")


def check_new_positions(caller: str, positions: ArrayLike, batch: int, num_new: int) -> Array:
    """Positions of new tokens as int32 (batch, num_new); raises ValueError as `check_positions` does."""
    return jnp.broadcast_to(check_positions(caller, "positions", positions, batch, num_new), (batch, num_new))
