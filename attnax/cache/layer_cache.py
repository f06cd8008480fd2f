"""The protocol of a layer's cache, and the operations on every cache of a pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from attnax.cache.chunks import Reading, SlotChunks, Source, TokenArrays
from attnax.checks import check_positions, check_shape, is_concrete
from attnax.int8_rows import Int8Rows, Rows, decode_rows, zero_rows
from attnax.masks import Mask, first, sliding_window
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = [
    "CacheCall",
    "InSlots",
    "LayerCache",
    "RowsOfText",
    "StoredTokens",
    "StoresTokens",
    "check_rows",
    "forget",
    "grow",
    "nan_where_lost",
    "select_rows",
]

Keeps = Literal["tokens", "sums"]

Caches = TypeVar("Caches")
Slots = TypeVar("Slots", bound=Any)


@runtime_checkable
class CacheCall(Protocol):
    """The new tokens of a layer, and the ways in which the layer attends; `LayerCache.attend` chooses one."""

    @property
    def new(self) -> dict[str, Array]:
        """The arrays of the new tokens by the names of the slots: `keys` (B, K, T, H), `values` (B, K, T, Hv)."""

    @property
    def positions(self) -> Int[Array, "#B T"]:
        """Of the new tokens; -1 is padding."""

    def attend_new(self, kept: Mask | None = None) -> Array:
        """The new tokens attend each other, at indices; padding is hidden, and pairs of positions outside of `kept`."""

    def attend_stored(self, stored: StoresTokens) -> Array:
        """The new tokens attend stored ones, at positions; `stored` is the second result of `append`."""

    def attend_sums(self, state: Any) -> tuple[Array, Any]:
        """Linear attention to sums and the new tokens: the output, and the sums with the new tokens."""


@runtime_checkable
class RowsOfText(Protocol):
    """What generation does with the cache of any step: choose its rows, and take tokens back."""

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> Any:
        """A cache of the rows `rows`: in any order, also repeated or left out."""

    def forget(self, first: Int[ArrayLike, "B"]) -> Any:
        """Takes back each row's tokens from position `first` on."""


@runtime_checkable
class LayerCache(RowsOfText, Protocol):
    """The methods of every cache of one layer. No cache changes in place.

    Each kind stores its arrays in its own layout and dtype; `tokens` reads every kind. A kind with tokens in slots
    derives from `InSlots`.
    """

    @property
    def keeps(self) -> Keeps:
        """What the cache keeps: "tokens" for softmax attention, "sums" for linear attention."""

    def slots_in_use(self) -> Int[Array, ""]:
        """The slots of a row that hold tokens or padding, at most; new tokens need as many slots more."""

    def grow(self, max_len: int, num_rows: int) -> Any:
        """The same tokens with room for `max_len` slots a row; a pool has room for `num_rows` such rows."""

    @property
    def is_empty(self) -> bool:
        """Whether the cache is known to hold no token: new tokens attend each other at indices, as without a cache."""

    def check(self, caller: str) -> None:
        """Raises ValueError if the cache cannot take part in a call of the layer `caller`."""

    def attend(self, call: CacheCall) -> tuple[Array, Any]:
        """The attention of the new tokens to the cache and to each other, and the cache with the new tokens."""

    def attend_first(self, call: CacheCall) -> tuple[Array, Any]:
        """`attend`, where the cache is known to be empty."""

    def tokens(self, dtype: Any) -> StoredTokens:
        """The tokens as arrays (batch, num_kv_heads, S, head_dim) of `dtype` with their positions, in any order.

        Raises:
            NotImplementedError: the cache stores no tokens.
        """

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""


def select_rows(caches: Caches, rows: Int[ArrayLike, "R"]) -> Caches:
    """`rows` of every cache in a pytree, and of all other arrays of the pytree along axis 0."""

    def select(node: Any) -> Any:
        return node.select_rows(rows) if isinstance(node, RowsOfText) else node[rows]

    return jax.tree.map(select, caches, is_leaf=lambda node: isinstance(node, RowsOfText))


def forget(caches: Caches, first: Int[ArrayLike, "B"]) -> Caches:
    """Takes back each row's tokens from position `first` on, in every cache of a pytree."""
    return jax.tree.map(lambda cache: cache.forget(first), caches, is_leaf=lambda node: isinstance(node, RowsOfText))


def grow(caches: Caches, max_len: int, num_rows: int) -> Caches:
    """The same tokens with room for `max_len` slots a row, in every cache of a pytree."""

    def grow_one(cache: Any) -> Any:
        return cache.grow(max_len, num_rows)

    return jax.tree.map(grow_one, caches, is_leaf=lambda node: isinstance(node, RowsOfText))


class StoresTokens:
    """The base of every LayerCache that stores tokens: softmax attention reads them, in chunks or as arrays.

    A kind defines `num_rows`, `num_positions`, `key_value`, `append`, `chunks` and `tokens`, which kernels and layers
    read, and `next_positions`, `slots_in_use`, `select_rows`, `forget` and `grow` of `LayerCache`.

    Attributes:
        overflowed: bool, () or (batch,), whether a write was dropped; attention then gives NaN.
        window: queries attend keys with |q - kv| < window; None if they attend all.
        num_sinks: with a window, queries attend the first `num_sinks` keys too.
    """

    overflowed: Bool[Array, "..."]
    window: int | None = None
    num_sinks: int = 0
    keeps: ClassVar[Keeps] = "tokens"
    is_empty: ClassVar[bool] = False

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        raise self._lacks("num_rows")

    @property
    def num_positions(self) -> int | None:
        """The number of positions that a mask array must cover; None if there is no bound."""
        raise self._lacks("num_positions")

    @property
    def key_value(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes (K, H) and (K, V) of the keys and values of a token, with the dtypes in which they are read."""
        raise self._lacks("key_value")

    @property
    def kept(self) -> Mask | None:
        """The pairs of positions that may attend: the cache keeps the keys of these pairs only. None for all pairs."""
        if self.window is None:
            return None
        near = sliding_window(self.window, causal=False)
        return near | first(self.num_sinks) if self.num_sinks else near

    def append(self, new: Mapping[str, Array], positions: ArrayLike) -> tuple[Any, Any]:
        """Returns (new cache, the tokens that the new tokens attend).

        The second result is the new cache, or a StoredTokens if the write loses a token that is still attended.

        Args:
            new: the arrays of T new tokens by name, each (batch, heads, T, size).
            positions: int32 (T,) or (batch, T), the index of each token in its row's text; -1 is padding.
        """
        raise self._lacks("append")

    def chunks(self, reading: Reading) -> Source:
        """The tokens in the pieces that a few queries read."""
        raise self._lacks("chunks")

    def arrays(self) -> TokenArrays | None:
        """The tokens as a kernel reads them, without a copy; None if it cannot."""
        return None

    def tokens(self, dtype: Any) -> StoredTokens:
        """As in `LayerCache`."""
        raise self._lacks("tokens")

    def next_positions(self) -> Int[Array, "B"]:
        """As in `LayerCache`."""
        raise self._lacks("next_positions")

    def slots_in_use(self) -> Int[Array, ""]:
        """As in `LayerCache`."""
        raise self._lacks("slots_in_use")

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> Any:
        """As in `LayerCache`."""
        raise self._lacks("select_rows")

    def forget(self, first: Int[ArrayLike, "B"]) -> Any:
        """As in `LayerCache`."""
        raise self._lacks("forget")

    def grow(self, max_len: int, num_rows: int) -> Any:
        """As in `LayerCache`."""
        raise self._lacks("grow")

    def _lacks(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}: a cache that stores tokens needs {name} here; attnax.cache.StoresTokens says what "
            "it is."
        )

    def store(self, new: Mapping[str, Array], positions: ArrayLike) -> Any:
        """`append` to an empty cache; padding behind the last token of all rows may take no slot."""
        cache, _ = self.append(new, positions)
        return cache

    def check(self, caller: str) -> None:
        """Every call may read the cache."""

    def attend(self, call: CacheCall) -> tuple[Array, Any]:
        """As in `LayerCache`."""
        cache, stored = self.append(call.new, call.positions)
        return nan_where_lost(call.attend_stored(stored), cache), cache

    def attend_first(self, call: CacheCall) -> tuple[Array, Any]:
        """As in `LayerCache`."""
        cache = self.store(call.new, call.positions)
        # A window alone is at least the layer's own, which is in its mask.
        return nan_where_lost(call.attend_new(self.kept if self.num_sinks else None), cache), cache


class InSlots(StoresTokens):
    """The base of a LayerCache whose tokens lie in slots, each with its position.

    The fields that `slot_names` lists are arrays with a vector for each slot and head: keys and values, and whatever
    else a layer keeps of a token. `keys_values` says which keys and values slots stand for. A kind that has other
    arrays, such as latents from which keys and values are projected, overrides it. A kind defines `append`.

    Attributes:
        keys: (batch, num_kv_heads, slots, head_dim).
        values: (batch, num_kv_heads, slots, value_head_dim).
        positions: int32 (batch, slots); -1 is empty or padding.
    """

    positions: Int[Array, "B S"]
    slot_names: ClassVar[tuple[str, ...]] = ("keys", "values")

    @property
    def slots(self) -> dict[str, Rows]:
        """The arrays of all slots by name, each (batch, heads, slots, size)."""
        return {name: getattr(self, name) for name in self.slot_names}

    def keys_values(self, slots: Mapping[str, Rows]) -> tuple[Rows, Rows]:
        """Keys (batch, num_kv_heads, S, head_dim) and values (batch, num_kv_heads, S, value_head_dim) of some slots.

        Args:
            slots: arrays as in `slots`, of any S.
        """
        return slots["keys"], slots["values"]

    @property
    def key_value(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        keys, values = jax.eval_shape(lambda cache: cache.keys_values(cache.slots), self)
        key, value = (jax.ShapeDtypeStruct((x.shape[1], x.shape[3]), x.dtype) for x in (keys, values))
        return key, value

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def num_positions(self) -> int | None:
        return self.max_len if self.window is None else None

    def slots_in_use(self) -> Int[Array, ""]:
        """The end of the slots in use; no later slot holds a token."""
        return jnp.int32(self.max_len)

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.positions.shape[1]

    def next_positions(self) -> Int[Array, "B"]:
        return self.positions.max(axis=1, initial=-1) + 1

    def chunks(self, reading: Reading) -> Source:
        return SlotChunks(self, self.slots_in_use())

    def arrays(self) -> TokenArrays | None:
        keys, values = self.keys_values(self.slots)
        if (
            isinstance(keys, Int8Rows)
            or isinstance(values, Int8Rows)
            or type(self).keys_values is not InSlots.keys_values
        ):
            return None
        return TokenArrays(keys, values, self.positions, None)

    def tokens(self, dtype: Any) -> StoredTokens:
        """All slots, as arrays of `dtype`."""
        keys, values = (decode_rows(rows, dtype) for rows in self.keys_values(self.slots))
        return StoredTokens(keys, values, self.positions, self.window, self.num_sinks)

    def select_rows(self: Slots, rows: Int[ArrayLike, "R"]) -> Slots:
        rows = check_rows("select_rows", rows, self.positions.shape[0])
        slots, positions = jax.tree.map(lambda x: x[rows], (self.slots, self.positions))
        return dataclasses.replace(self, **slots, positions=positions)

    def forget(self: Slots, first: Int[ArrayLike, "B"]) -> Slots:
        """Takes back each row's tokens from position `first` on, by marking their slots as empty."""
        check_shape("forget", "first", first, self.positions.shape[:1], integers=True)
        first = jnp.asarray(first, jnp.int32)
        return dataclasses.replace(self, positions=jnp.where(self.positions < first[:, None], self.positions, -1))

    def grow(self: Slots, max_len: int, num_rows: int) -> Slots:
        missing = max(0, max_len - self.positions.shape[1])
        slots = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))), self.slots)
        positions = jnp.pad(self.positions, ((0, 0), (0, missing)), constant_values=-1)
        return dataclasses.replace(self, **slots, positions=positions)


@pytree_dataclass
class StoredTokens(InSlots):
    """Tokens in one piece, in any order.

    Attributes:
        keys: (batch, num_kv_heads, S, head_dim), rotated.
        values: (batch, num_kv_heads, S, value_head_dim).
        positions: int32 (batch, S); -1 is no token.
        window: queries attend keys with |q - kv| < window; None if they attend all.
        num_sinks: with a window, queries attend the first `num_sinks` keys too.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    positions: Int[Array, "B S"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    num_sinks: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def num_positions(self) -> int | None:
        return None

    @property
    def overflowed(self) -> Bool[Array, ""]:  # type: ignore[override]
        """False: no write was dropped."""
        return jnp.zeros((), bool)


def nan_where_lost(results: Any, cache: Any) -> Any:
    """Results (B, ...) with NaN in the rows where the cache dropped a write, so that the error is seen."""

    def mark(x: Array) -> Array:
        return jnp.where(cache.overflowed.reshape(-1, *(1,) * (x.ndim - 1)), jnp.nan, x)

    return jax.tree.map(mark, results)


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
    """Raises ValueError for a size that is no whole number or below 1."""
    for name, size in sizes.items():
        if isinstance(size, str | float | np.floating | bool | None):  # other types are whole, or sizes of an export
            raise ValueError(f"{caller}: {name} must be a whole number, at least 1; got {name}={size!r}.")
        if size < 1:
            raise ValueError(f"{caller}: {name} must be at least 1; got {name}={size}.")


def check_new_tokens(
    caller: str,
    held: Mapping[str, Rows | jax.ShapeDtypeStruct],
    new: Mapping[str, ArrayLike],
    num_new: int,
    suffix: str = "",
) -> None:
    """Raises ValueError unless `new` has the arrays of `held`, (batch, heads, slots, size), with `num_new` slots.

    Args:
        caller: for the message.
        held: the arrays of the cache by name.
        new: the arrays of the new tokens by name.
        num_new: new tokens.
        suffix: what the caller's arguments have behind the names of the arrays, if they are arguments.
    """
    if not isinstance(new, Mapping) or new.keys() != held.keys():
        got = ", ".join(new) or "none" if isinstance(new, Mapping) else type(new).__name__
        raise ValueError(f"{caller}: new must hold the arrays {', '.join(held)} by name; got {got}.")
    for name, like in held.items():
        want, x, shown = (*like.shape[:2], num_new, like.shape[3]), new[name], name + suffix
        if x.shape != want:
            raise ValueError(
                f"{caller}: {shown} must have shape (batch, num_kv_heads, new tokens, size)={want}; got "
                f"{shown}.shape={x.shape}."
            )


def count_new(new: Mapping[str, ArrayLike]) -> int:
    """T of arrays (batch, heads, T, size); 0 for arrays of another shape, which `check_new_tokens` refuses."""
    first = next(iter(new.values()), None) if isinstance(new, Mapping) else None
    return first.shape[2] if first is not None and first.ndim == 4 else 0


def check_new_positions(caller: str, positions: ArrayLike, batch: int, num_new: int) -> Array:
    """Positions of new tokens as int32 (batch, num_new); raises ValueError as `check_positions` does."""
    return jnp.broadcast_to(check_positions(caller, "positions", positions, batch, num_new), (batch, num_new))
