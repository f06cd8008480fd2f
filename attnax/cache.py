"""What a layer remembers of the tokens read so far, as pytrees of fixed shape, so that decoding compiles once.

Every kind of cache obeys `LayerCache`, and attention takes any of them:

- `KVLayerCache`: tokens lie in the order in which they were written, padding included;
- `RingKVCache`: the token at position p of a row lies in slot p % slots, so that rows of different lengths waste
  nothing, tokens can be taken back, and a layer with a window needs the memory of the window only;
- `LinearLayerCache`: the sums of linear attention, of one size whatever the length;
- `attnax.paged_cache.PagedKVCache`: all rows share a pool of blocks;
- `EmptyCache`: any of these before its first token.

Keys and values may be stored as 8-bit integers: with `dtype="int8"` each head of each token has a scale of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from attnax.checks import check_positions, check_shape, is_concrete, wide_dtype
from attnax.config import AttentionType, BlockConfig, TransformerConfig
from attnax.int8_rows import Int8Rows, Rows, decode_rows, encode_rows, zero_rows
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = [
    "SPARE_SLOTS",
    "EmptyCache",
    "KVLayerCache",
    "LayerCache",
    "LinearLayerCache",
    "LinearState",
    "RingKVCache",
    "StoredTokens",
    "check_rows",
    "forget",
    "init_decoder_kv_caches",
    "init_decoder_kv_caches_from_config",
    "init_kv_layer_cache",
    "init_linear_layer_cache",
    "init_ring_kv_cache",
    "select_rows",
    "update_kv_layer_cache",
]

Caches = TypeVar("Caches")


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
        """No slot from here on holds a token."""
        return jnp.int32(self.positions.shape[1])

    @property
    def num_positions(self) -> int | None:
        """The positions that masks given as arrays must know: any."""
        return None

    @property
    def overflowed(self) -> Bool[Array, ""]:
        """Nothing was dropped."""
        return jnp.zeros((), bool)

    def tokens(self, dtype: Any) -> StoredTokens:
        """The same, as arrays."""
        return _slots_as_arrays(self, dtype)


@runtime_checkable
class LayerCache(Protocol):
    """What every cache of one layer can do; none changes in place.

    Each kind stores keys and values in its own layout and dtype; `tokens` reads any of them.

    Those that store tokens also have `append(keys, values, positions)`, which gives the new cache and what holds all
    that the new tokens may attend (the same, but for a ring that would overwrite some of it).
    """

    def tokens(self, dtype: Any) -> StoredTokens:
        """The tokens as arrays (batch, num_kv_heads, S, head_dim) of `dtype` with their positions, in any order.

        Raises:
            NotImplementedError: the cache stores no tokens.
        """

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> Any:
        """A cache of the rows named, which may be more or fewer, in any order and repeated."""

    def forget(self, first: Int[ArrayLike, "B"]) -> Any:
        """Takes back each row's tokens from position `first` on."""


def select_rows(caches: Caches, rows: Int[ArrayLike, "R"]) -> Caches:
    """The rows named of every cache in a pytree; other arrays in it have their rows along axis 0."""

    def select(node: Any) -> Any:
        return node.select_rows(rows) if isinstance(node, LayerCache) else node[rows]

    return jax.tree.map(select, caches, is_leaf=lambda node: isinstance(node, LayerCache))


def forget(caches: Caches, first: Int[ArrayLike, "B"]) -> Caches:
    """Takes back each row's tokens from position `first` on, in every cache of a pytree."""
    return jax.tree.map(lambda cache: cache.forget(first), caches, is_leaf=lambda node: isinstance(node, LayerCache))


@pytree_dataclass
class EmptyCache:
    """A cache that holds no token yet, said by its type: an array cannot say so in a program that is being traced.

    The tokens of a prompt that enters it attend each other by index, as without a cache, and are stored. A layer gives
    back the cache itself, which then holds them.

    Attributes:
        cache: of any kind, without tokens; layers raise ValueError where it is known to hold some.
    """

    cache: Any

    def check(self, caller: str) -> None:
        """Raises ValueError if it holds no cache, or one that is known to hold tokens."""
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

    def next_positions(self) -> Int[Array, "B"]:
        """0 for each row."""
        return self.cache.next_positions()

    def tokens(self, dtype: Any) -> StoredTokens:
        """Slots without a token."""
        stored: StoredTokens = self.cache.tokens(dtype)
        return stored

    def store(self, keys: Array, values: Array, positions: ArrayLike) -> Any:
        """The cache itself with the tokens of a prompt, given as to `append`.

        Padding behind the last token of all rows takes no slot.
        """
        cache, _ = self.cache.append(keys, values, positions)
        if not isinstance(cache, KVLayerCache):
            return cache
        real = (jnp.atleast_2d(positions) >= 0).any(0)
        length = jnp.where(real, jnp.arange(1, real.size + 1, dtype=jnp.int32), 0).max(initial=0)
        return dataclasses.replace(cache, length=jnp.minimum(cache.length, length))

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> EmptyCache:
        """A cache of the rows named."""
        return EmptyCache(self.cache.select_rows(rows))

    def forget(self, first: Int[ArrayLike, "B"]) -> EmptyCache:
        """The same: there is nothing to take back."""
        return self


@pytree_dataclass
class KVLayerCache:
    """Keys and values of one attention layer; keys are stored after their rotation.

    Attributes:
        keys: (batch, num_kv_heads, max_len, head_dim).
        values: (batch, num_kv_heads, max_len, value_head_dim).
        length: int32 scalar, the slots written so far (the same for every row; padding takes slots too).
        positions: int32 (batch, max_len), each slot's index within its row's own text; -1 is empty or padding.
        overflowed: whether a write beyond max_len was ever dropped; attention then gives NaN.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    length: Int[Array, ""]
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, ""]

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.keys.shape[2]

    @property
    def num_positions(self) -> int | None:
        """The positions that masks given as arrays must know; None if there is no bound."""
        return self.max_len

    @property
    def window(self) -> int | None:
        """Queries attend all keys."""
        return None

    @property
    def slots_in_use(self) -> Int[Array, ""]:
        """No slot from here on holds a token."""
        return self.length

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""
        return self.positions.max(axis=1, initial=-1) + 1

    def append(self, keys: Array, values: Array, positions: ArrayLike) -> tuple[KVLayerCache, KVLayerCache]:
        """The cache with more tokens, and what holds all that these may attend: the same."""
        cache = update_kv_layer_cache(self, keys, values, positions=positions)
        return cache, cache

    def tokens(self, dtype: Any) -> StoredTokens:
        """All slots, as arrays."""
        return _slots_as_arrays(self, dtype)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> KVLayerCache:
        """A cache of the rows named."""
        return _select_slots(self, rows)

    def forget(self, first: Int[ArrayLike, "B"]) -> KVLayerCache:
        """Takes back each row's tokens from position `first` on; their slots stay taken."""
        return _forget_slots(self, first)


@pytree_dataclass
class RingKVCache:
    """Keys and values of one layer; a row's token at position p lies in slot p % slots. Padding takes no slot.

    With a window a new token takes the place of one that no later query attends; without, positions end with the slots.

    Attributes:
        keys: (batch, num_kv_heads, slots, head_dim).
        values: (batch, num_kv_heads, slots, value_head_dim).
        positions: int32 (batch, slots), whose token each slot holds; -1 is empty.
        overflowed: bool (batch,), whether a token past the slots was dropped; attention then gives NaN.
        window: queries attend keys with |q - kv| < window; None if they attend all.
    """

    keys: Float[Array, "B K S H"] | Int8Rows
    values: Float[Array, "B K S Hv"] | Int8Rows
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, "B"]
    window: int | None = dataclasses.field(metadata={"static": True})

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.keys.shape[2]

    @property
    def num_positions(self) -> int | None:
        """The positions that masks given as arrays must know; None if there is no bound."""
        return self.max_len if self.window is None else None

    @property
    def slots_in_use(self) -> Int[Array, ""]:
        """No slot from here on holds a token."""
        return jnp.minimum(self.next_positions().max(initial=0), self.max_len)

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""
        return self.positions.max(axis=1, initial=-1) + 1

    def append(
        self, keys: Array, values: Array, positions: ArrayLike
    ) -> tuple[RingKVCache, RingKVCache | StoredTokens]:
        """The cache with more tokens, and what holds all that these may attend.

        Where the new tokens would overwrite keys that the first of them still attends, that is a copy of what was
        there with them behind it.

        Raises:
            ValueError: shapes that do not fit the cache, a position past the slots without a window, or with one
                positions so far apart that one of them overwrites what another attends. Where positions are traced the
                latter two cannot be raised: `overflowed` is set for good.
        """
        batch, num_new = _check_new_tokens("RingKVCache.append", self, keys, values)
        slots, window = self.max_len, self.window
        positions = _check_new_positions("RingKVCache.append", positions, batch, num_new)
        kept, joins = positions >= 0, window is not None and num_new + window - 1 > slots
        last = positions.max(axis=1, initial=-1, keepdims=True)
        if window is None:
            fits, rule = last[:, 0] < slots, f"must be below the number of slots, {slots}, unless there is a window"
        else:  # of two tokens for one slot the later stays
            first = jnp.where(kept, positions, last).min(axis=1, initial=jnp.iinfo(jnp.int32).max)
            fits = jnp.full((batch,), joins) | (last[:, 0] - first <= slots - window)
            rule = f"of one call must lie within {slots - window + 1}, slots - window + 1, so that all can be attended"
        if is_concrete(fits) and not fits.all():
            raise ValueError(
                f"RingKVCache.append: positions {rule}; got positions up to {int(last.max())} in {num_new} tokens. "
                "Make the cache longer."
            )
        kept = kept & (positions > last - slots) & (positions < slots if window is None else True)
        slot = jnp.where(kept, positions % slots, slots)  # one past the end is dropped
        rows = jnp.arange(batch)[:, None]
        held, new = (self.keys, self.values), (encode_rows(keys, self.keys), encode_rows(values, self.values))
        written = jax.tree.map(lambda x, y: x.at[rows, :, slot].set(y.swapaxes(1, 2), mode="drop"), held, new)
        cache = RingKVCache(
            keys=written[0],
            values=written[1],
            positions=self.positions.at[rows, slot].set(positions, mode="drop"),
            overflowed=self.overflowed | ~fits,
            window=window,
        )
        if not joins:
            return cache, cache
        all_keys, all_values = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), held, new)
        return cache, StoredTokens(all_keys, all_values, jnp.concatenate([self.positions, positions], axis=1), window)

    def tokens(self, dtype: Any) -> StoredTokens:
        """All slots, as arrays."""
        return _slots_as_arrays(self, dtype)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> RingKVCache:
        """A cache of the rows named."""
        cache = _select_slots(self, rows)
        return dataclasses.replace(cache, overflowed=self.overflowed[jnp.asarray(rows)])

    def forget(self, first: Int[ArrayLike, "B"]) -> RingKVCache:
        """Takes back each row's tokens from position `first` on, whose slots are free again.

        With a window, what these had overwritten does not come back: that is no loss as long as no more than
        slots - window tokens are taken back. A row of which more were has `overflowed` set.
        """
        cache = _forget_slots(self, first)
        if self.window is None:
            return cache
        first = jnp.maximum(jnp.asarray(first, jnp.int32), 0)
        attended = cache.positions > first[:, None] - self.window  # by the token that comes next
        lost = (attended & (cache.positions >= 0)).sum(1) < jnp.minimum(first, self.window - 1)
        forgets = (self.positions >= first[:, None]).any(1)
        return dataclasses.replace(cache, overflowed=self.overflowed | (forgets & lost))


@pytree_dataclass
class LinearState:
    """All keys and values that linear attention met so far: sums over them, in float32 (float64 for float64)."""

    key_value_sum: Array  # (B, K, H, Hv), sum of phi(key) value^T
    key_sum: Array  # (B, K, H), sum of phi(key); NaN once a key or value held a NaN or infinity


@pytree_dataclass
class LinearLayerCache:
    """The state of one layer of causal linear attention.

    Attributes:
        state: sums over the keys and values read so far.
        lengths: int32 (batch,), the tokens of each row.
    """

    state: LinearState
    lengths: Int[Array, "B"]

    def tokens(self, dtype: Any) -> StoredTokens:
        """Raises NotImplementedError: a sum does not know its terms."""
        raise NotImplementedError(
            "LinearLayerCache: the sums of linear attention store no tokens. Use a softmax kernel to read them."
        )

    def next_positions(self) -> Int[Array, "B"]:
        """The position that follows the last token of each row."""
        return self.lengths

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> LinearLayerCache:
        """A cache of the rows named."""
        rows = check_rows("LinearLayerCache.select_rows", rows, self.lengths.shape[0])
        return jax.tree.map(lambda x: x[rows], self)

    def forget(self, first: Int[ArrayLike, "B"]) -> LinearLayerCache:
        """Raises NotImplementedError: a sum does not know its terms."""
        raise NotImplementedError(
            "LinearLayerCache: the sums of linear attention cannot take tokens back. Use a softmax kernel, or decode "
            "without a draft."
        )


def init_kv_layer_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: Any = jnp.float32,
    *,
    value_head_dim: int | None = None,
) -> KVLayerCache:
    """An empty cache for `max_len` tokens a row; values are as wide as keys by default.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        head_dim: size of a key.
        max_len: tokens of a row.
        dtype: of keys and values; int8 stores 8-bit integers with a float32 scale for each head of each token.
        value_head_dim: size of a value.

    Raises:
        ValueError: a size below 1.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    _check_sizes(
        "init_kv_layer_cache",
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        max_len=max_len,
    )
    return KVLayerCache(
        keys=zero_rows((batch_size, num_kv_heads, max_len, head_dim), dtype),
        values=zero_rows((batch_size, num_kv_heads, max_len, value_head_dim), dtype),
        length=jnp.zeros((), jnp.int32),
        positions=jnp.full((batch_size, max_len), -1, jnp.int32),
        overflowed=jnp.zeros((), bool),
    )


def init_ring_kv_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: Any = jnp.float32,
    *,
    window: int | None = None,
    value_head_dim: int | None = None,
) -> RingKVCache:
    """An empty ring of `max_len` slots a row.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        head_dim: size of a key.
        max_len: slots of a row; at least the window. With `window + n` slots, chunks of up to n + 1 tokens are written
            before they are attended, which saves a copy, and n tokens can be taken back.
        dtype: as in `init_kv_layer_cache`.
        window: queries attend keys with |q - kv| < window; None if they attend all, which then end with the slots.
        value_head_dim: size of a value.

    Raises:
        ValueError: a size below 1, or fewer slots than the window.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    _check_sizes(
        "init_ring_kv_cache",
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        max_len=max_len,
        window=max_len if window is None else window,
    )
    if window is not None and max_len < window:
        raise ValueError(
            f"init_ring_kv_cache: max_len must be at least the window; got max_len={max_len}, window={window}."
        )
    return RingKVCache(
        keys=zero_rows((batch_size, num_kv_heads, max_len, head_dim), dtype),
        values=zero_rows((batch_size, num_kv_heads, max_len, value_head_dim), dtype),
        positions=jnp.full((batch_size, max_len), -1, jnp.int32),
        overflowed=jnp.zeros((batch_size,), bool),
        window=window,
    )


def init_linear_layer_cache(
    batch_size: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.float32, *, value_head_dim: int | None = None
) -> LinearLayerCache:
    """The state of a layer of linear attention before its first token; sums are at least float32.

    Raises:
        ValueError: a size below 1.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    _check_sizes(
        "init_linear_layer_cache",
        batch_size=batch_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
    )
    dtype = wide_dtype(dtype)
    state = LinearState(
        key_value_sum=jnp.zeros((batch_size, num_kv_heads, head_dim, value_head_dim), dtype),
        key_sum=jnp.zeros((batch_size, num_kv_heads, head_dim), dtype),
    )
    return LinearLayerCache(state, jnp.zeros((batch_size,), jnp.int32))


def init_decoder_kv_caches(
    *, num_layers: int, batch_size: int, num_kv_heads: int, head_dim: int, max_len: int, dtype: Any = jnp.float32
) -> tuple[KVLayerCache, ...]:
    """One empty cache a layer."""
    return tuple(init_kv_layer_cache(batch_size, num_kv_heads, head_dim, max_len, dtype) for _ in range(num_layers))


def init_decoder_kv_caches_from_config(
    config: TransformerConfig, *, batch_size: int, max_len: int | None = None, dtype: Any = None, ring: bool = False
) -> tuple[Any, ...]:
    """One empty cache a layer of a model of this config.

    A layer with an `attention_window` gets a RingKVCache of that size where this is less than `max_len`, one of linear
    attention a LinearLayerCache, any other a KVLayerCache. `attnax.paged_cache` makes paged caches.

    Args:
        config: of the model.
        batch_size: rows.
        max_len: capacity in tokens, by default `config.kv_cache_max_len`, else `config.max_len`.
        dtype: of keys and values, by default `config.dtype`; int8 as in `init_kv_layer_cache`.
        ring: a RingKVCache for the other layers too: rows of different lengths then waste no slots, and tokens can be
            taken back.
    """
    max_len = next(size for size in (max_len, config.kv_cache_max_len, config.max_len) if size is not None)

    def init(layer: BlockConfig) -> Any:
        sizes = batch_size, layer.kv_heads, layer.head_size
        stored, values = layer.dtype if dtype is None else dtype, layer.value_head_size
        if layer.attention_type == AttentionType.LINEAR:
            return init_linear_layer_cache(*sizes, layer.dtype, value_head_dim=values)
        window = layer.attention_window
        if window is not None and window + SPARE_SLOTS < max_len:
            return init_ring_kv_cache(*sizes, window + SPARE_SLOTS, stored, window=window, value_head_dim=values)
        if ring:
            return init_ring_kv_cache(*sizes, max_len, stored, value_head_dim=values)
        return init_kv_layer_cache(*sizes, max_len, stored, value_head_dim=values)

    return tuple(init(config.layer(index)) for index in range(config.num_layers))


def update_kv_layer_cache(
    cache: KVLayerCache,
    keys_new: Float[Array, "B K T H"],
    values_new: Float[Array, "B K T Hv"],
    start: int | Int[ArrayLike, ""] | None = None,
    *,
    positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
) -> KVLayerCache:
    """Writes T tokens into slots start ... start + T - 1.

    Args:
        cache: stays as it is; the result is a new one (donate the old one under jit to write in place).
        keys_new: (batch, num_kv_heads, T, head_dim).
        values_new: (batch, num_kv_heads, T, value_head_dim).
        start: first slot, by default `cache.length`.
        positions: (T,) or (batch, T), each token's index within its row's text, -1 for padding; by default the slot
            numbers.

    Raises:
        ValueError: shapes that do not fit the cache, or tokens that do not fit into it. Where `start` is traced
            the latter cannot be raised: nothing is written then and `overflowed` is set for good.
    """
    batch, num_new = _check_new_tokens("update_kv_layer_cache", cache, keys_new, values_new)
    max_len = cache.max_len
    if start is not None:
        check_shape("update_kv_layer_cache", "start", start, (), integers=True)
    start = cache.length if start is None else jnp.asarray(start, jnp.int32)
    if is_concrete(start) and not 0 <= int(start) <= max_len - num_new:
        raise ValueError(
            f"update_kv_layer_cache: {num_new} tokens from slot {int(start)} do not fit into a cache of "
            f"max_len={max_len}. Make the cache longer."
        )
    if num_new > max_len:  # traced start: no slice of this size exists to write back to
        return dataclasses.replace(cache, overflowed=jnp.ones((), bool))
    fits = (start >= 0) & (start + num_new <= max_len)
    slots = start + jnp.arange(num_new, dtype=jnp.int32)
    positions = slots if positions is None else positions
    positions = _check_new_positions("update_kv_layer_cache", positions, batch, num_new)

    def write(buffer: Array, new: Array, axis: int) -> Array:
        # A write that does not fit puts back what was there: cheaper than choosing between two whole caches.
        old = lax.dynamic_slice_in_dim(buffer, start, num_new, axis)
        return lax.dynamic_update_slice_in_dim(buffer, jnp.where(fits, new, old), start, axis)

    def write_rows(held: Rows, new: Array) -> Rows:
        return jax.tree.map(lambda buffer, part: write(buffer, part, 2), held, encode_rows(new, held))

    return KVLayerCache(
        keys=write_rows(cache.keys, keys_new),
        values=write_rows(cache.values, values_new),
        length=jnp.where(fits, jnp.maximum(cache.length, start + num_new), cache.length),
        positions=write(cache.positions, positions, 1),
        overflowed=cache.overflowed | ~fits,
    )


SPARE_SLOTS = 16  # of the ring of a window: the chunk of a draft is written before it is attended, and taken back

Slots = TypeVar("Slots", KVLayerCache, RingKVCache)


def check_rows(caller: str, rows: Int[ArrayLike, "R"], batch: int) -> Array:
    """Raises ValueError for rows that are no integers, or concrete and not there."""
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"{caller}: rows must be integers in one axis; got shape={rows.shape}, dtype={rows.dtype}.")
    if is_concrete(rows) and ((rows < 0) | (rows >= batch)).any():
        raise ValueError(f"{caller}: rows must be at least 0 and below {batch}; got rows={rows.tolist()}.")
    return rows


def _slots_as_arrays(cache: KVLayerCache | RingKVCache | StoredTokens, dtype: Any) -> StoredTokens:
    keys, values = decode_rows(cache.keys, dtype), decode_rows(cache.values, dtype)
    return StoredTokens(keys, values, cache.positions, cache.window)


def _select_slots(cache: Slots, rows: Int[ArrayLike, "R"]) -> Slots:
    rows = check_rows("select_rows", rows, cache.positions.shape[0])
    keys, values, positions = jax.tree.map(lambda x: x[rows], (cache.keys, cache.values, cache.positions))
    return dataclasses.replace(cache, keys=keys, values=values, positions=positions)


def _forget_slots(cache: Slots, first: Int[ArrayLike, "B"]) -> Slots:
    check_shape("forget", "first", first, cache.positions.shape[:1], integers=True)
    first = jnp.asarray(first, jnp.int32)
    positions = jnp.where(cache.positions < first[:, None], cache.positions, -1)
    return dataclasses.replace(cache, positions=positions)


def _check_sizes(caller: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{caller}: {name} must be at least 1; got {name}={size}.")


def _check_new_tokens(caller: str, cache: KVLayerCache | RingKVCache, keys: Array, values: Array) -> tuple[int, int]:
    """(rows, new tokens); raises ValueError unless keys and values fit the cache."""
    batch, heads, _, _ = cache.keys.shape
    num_new = keys.shape[2] if keys.ndim == 4 else 0
    for name, new, held in (("keys_new", keys, cache.keys), ("values_new", values, cache.values)):
        want = (batch, heads, num_new, held.shape[3])
        if new.shape != want:
            raise ValueError(
                f"{caller}: {name} must have shape (batch, num_kv_heads, new tokens, head_dim)={want}; got {new.shape}."
            )
    return batch, num_new


def _check_new_positions(caller: str, positions: ArrayLike, batch: int, num_new: int) -> Array:
    return jnp.broadcast_to(check_positions(caller, "positions", positions, batch, num_new), (batch, num_new))
