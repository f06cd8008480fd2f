"""The paged cache of one layer, and the operations on all of its rows at once, whose shapes never change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.cache.chunks import Reading, TokenArrays
from attnax.cache.layer_cache import (
    StoredTokens,
    StoresTokens,
    check_new_positions,
    check_new_tokens,
    check_rows,
    check_sizes,
    count_new,
)
from attnax.checks import check_shape, is_concrete
from attnax.config import TransformerConfig
from attnax.int8_rows import Int8Rows, zero_rows
from attnax.paged_cache.chunks import PageChunks
from attnax.paged_cache.pool import Pool, give_blocks, missing_blocks, read_blocks, write_tokens
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = [
    "PagedKVCache",
    "allocate_rows",
    "append_rows",
    "free_rows",
    "gather_rows",
    "init_paged_kv_cache",
    "init_paged_kv_caches_from_config",
]


@pytree_dataclass
class PagedKVCache(StoresTokens):
    """Keys and values of one attention layer for `batch` sequences of their own lengths.

    Attributes:
        key_pool: (num_blocks, num_kv_heads, block_size, head_dim).
        value_pool: (num_blocks, num_kv_heads, block_size, value_dim).
        block_table: int32 (batch, max_blocks_per_seq), the blocks that each row holds, in order; -1 is unused, and
            only -1 follows -1. No block stands in the table twice.
        seq_lengths: int32 (batch,), the tokens of each row.
        overflowed: bool (batch,), whether blocks or room ran out under jit, so that tokens of the row may be missing;
            stays set until the row is freed.
    """

    key_pool: Float[Array, "P K Z H"] | Int8Rows
    value_pool: Float[Array, "P K Z Hv"] | Int8Rows
    block_table: Int[Array, "B M"]
    seq_lengths: Int[Array, "B"]
    overflowed: Bool[Array, "B"]

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.key_pool.shape[2]

    @property
    def max_len(self) -> int:
        """Tokens a row can hold, if the pool has the blocks."""
        return self.block_table.shape[1] * self.block_size

    @property
    def num_positions(self) -> int | None:
        return self.max_len

    def next_positions(self) -> Int[Array, "B"]:
        return self.seq_lengths

    def slots_in_use(self) -> Int[Array, ""]:
        return self.seq_lengths.max(initial=0)

    @property
    def num_rows(self) -> int:
        return self.seq_lengths.shape[0]

    @property
    def key_value(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        keys, values = (
            jax.ShapeDtypeStruct((pool.shape[1], pool.shape[3]), pool.dtype)
            for pool in (self.key_pool, self.value_pool)
        )
        return keys, values

    def chunks(self, reading: Reading) -> PageChunks:
        return PageChunks.to_read((self.key_pool, self.value_pool), self.block_table, self.seq_lengths, reading)

    def arrays(self) -> TokenArrays | None:
        if isinstance(self.key_pool, Int8Rows) or isinstance(self.value_pool, Int8Rows):
            return None
        index = jnp.arange(self.max_len, dtype=jnp.int32)[None]
        exists = jnp.repeat(self.block_table >= 0, self.block_size, axis=1) & (index < self.seq_lengths[:, None])
        return TokenArrays(self.key_pool, self.value_pool, jnp.where(exists, index, -1), self.block_table)

    def append(self, new: Mapping[str, Array], positions: ArrayLike) -> tuple[PagedKVCache, PagedKVCache]:
        """The cache with the new tokens, twice; rows take the blocks that they lack.

        Args:
            new: `keys` (batch, num_kv_heads, T, head_dim) and `values` (batch, num_kv_heads, T, value_dim).
            positions: int32 (T,) or (batch, T): the tokens of a row count on from `seq_lengths`; -1 is padding, which
                is not stored.

        Raises:
            ValueError: shapes that do not fit, too few free blocks, or positions that do not count on. With traced
                positions the last two cannot be raised: `overflowed` is set then.
        """
        batch, num_new = self.num_rows, count_new(new)
        _check_tokens("PagedKVCache.append", self, new, num_new)
        positions = check_new_positions("PagedKVCache.append", positions, batch, num_new)
        real = positions >= 0
        count_on = self.seq_lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        in_order = (~real | (positions == count_on)).all(1)
        if is_concrete(in_order) and not in_order.all():
            raise ValueError(
                f"PagedKVCache.append: positions must count on from seq_lengths={self.seq_lengths.tolist()}, with -1 "
                f"for padding; got {np.asarray(positions).tolist()}."
            )
        if num_new > 1:  # padding to the right
            order = jnp.argsort(~real, axis=1, stable=True)[:, None, :, None]
            new = {name: jnp.take_along_axis(x, order, axis=2) for name, x in new.items()}
        counts = real.sum(1, dtype=jnp.int32)
        cache = append_rows(allocate_rows(self, counts), new["keys"], new["values"], counts)
        cache = dataclasses.replace(cache, overflowed=cache.overflowed | ~in_order)
        return cache, cache

    def tokens(self, dtype: Any) -> StoredTokens:
        keys, values, lengths = gather_rows(self)
        slots = jnp.arange(self.max_len, dtype=jnp.int32)[None]
        positions = jnp.where(slots < lengths[:, None], slots, -1)
        return StoredTokens(keys.astype(dtype), values.astype(dtype), positions)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> PagedKVCache:
        """A cache of the rows `rows`, each with its own copy of the blocks; the pool stays as large as it is.

        Raises:
            ValueError: the pool has too few blocks. With a traced table this cannot be raised: `overflowed` is set for
                the rows that got too few.
        """
        rows = check_rows("PagedKVCache.select_rows", rows, self.seq_lengths.shape[0])
        num_blocks = self.key_pool.shape[0]
        source = self.block_table[rows]
        held = source >= 0
        table = jnp.cumsum(held.reshape(-1), dtype=jnp.int32).reshape(held.shape) - 1
        fits = (~held | (table < num_blocks)).all(1)
        if is_concrete(fits) and not fits.all():
            raise ValueError(
                f"PagedKVCache.select_rows: rows {np.asarray(rows).tolist()} hold {int(held.sum())} blocks; got a pool "
                f"of {num_blocks}. Make the pool larger."
            )
        target = jnp.where(held, table, num_blocks)  # past the end: dropped
        pools = self.key_pool, self.value_pool
        key_pool, value_pool = jax.tree.map(lambda x: jnp.asarray(x).at[target].set(x[source], mode="drop"), pools)
        return PagedKVCache(
            key_pool=key_pool,
            value_pool=value_pool,
            block_table=jnp.where(held & fits[:, None], table, -1),
            seq_lengths=jnp.where(fits, self.seq_lengths[rows], 0),
            overflowed=self.overflowed[rows] | ~fits,
        )

    def grow(self, max_len: int, num_rows: int) -> PagedKVCache:
        """A row may hold `max_len` tokens, and the pool has blocks for `num_rows` such rows."""
        blocks = max(self.block_table.shape[1], -(-max_len // self.block_size))
        missing = max(0, num_rows * blocks - self.key_pool.shape[0])
        pools = self.key_pool, self.value_pool
        key_pool, value_pool = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0))), pools)
        unused = ((0, 0), (0, blocks - self.block_table.shape[1]))
        table = jnp.pad(self.block_table, unused, constant_values=-1)
        return dataclasses.replace(self, key_pool=key_pool, value_pool=value_pool, block_table=table)

    def forget(self, first: Int[ArrayLike, "B"]) -> PagedKVCache:
        """Takes back each row's tokens from position `first` on; the row keeps their blocks. Below 0 stands for 0."""
        check_shape("forget", "first", first, self.seq_lengths.shape, integers=True)
        first = jnp.maximum(jnp.asarray(first, jnp.int32), 0)
        return dataclasses.replace(self, seq_lengths=jnp.minimum(self.seq_lengths, first))


def init_paged_kv_cache(
    *,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    batch_size: int,
    max_blocks_per_seq: int,
    dtype: Any = jnp.float32,
    value_dim: int | None = None,
) -> PagedKVCache:
    """An empty cache: `num_blocks` blocks of `block_size` tokens, held by none of the `batch_size` rows.

    Args:
        num_blocks: blocks of the pool, for all rows together.
        block_size: tokens a block holds.
        num_kv_heads: heads of keys and values.
        head_dim: size of a key.
        batch_size: rows, sequences that are held at the same time.
        max_blocks_per_seq: blocks that one row may hold.
        dtype: of keys and values; int8 as in `attnax.init_kv_layer_cache`.
        value_dim: size of a value, by default `head_dim`.

    Raises:
        ValueError: a size below 1.
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    sizes |= {"batch_size": batch_size, "max_blocks_per_seq": max_blocks_per_seq, "value_dim": value_dim}
    check_sizes("init_paged_kv_cache", **sizes)
    return PagedKVCache(
        key_pool=zero_rows((num_blocks, num_kv_heads, block_size, head_dim), dtype),
        value_pool=zero_rows((num_blocks, num_kv_heads, block_size, value_dim), dtype),
        block_table=jnp.full((batch_size, max_blocks_per_seq), -1, jnp.int32),
        seq_lengths=jnp.zeros(batch_size, jnp.int32),
        overflowed=jnp.zeros(batch_size, bool),
    )


def init_paged_kv_caches_from_config(
    config: TransformerConfig,
    *,
    batch_size: int,
    max_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    dtype: Any = None,
) -> tuple[PagedKVCache, ...]:
    """One empty paged cache a layer of a model of this config.

    Args:
        config: of the model.
        batch_size: rows.
        max_len: tokens that one row may hold, by default `config.kv_cache_max_len`, else `config.max_len`.
        block_size: tokens a block holds.
        num_blocks: blocks of each layer's pool, by default enough for all rows to be full.
        dtype: of keys and values, by default `config.dtype`; int8 as in `attnax.init_kv_layer_cache`.

    Raises:
        ValueError: a size below 1, or a layer of linear attention, which stores no tokens.
    """
    max_len = config.cache_max_len if max_len is None else max_len
    check_sizes("init_paged_kv_caches_from_config", max_len=max_len, block_size=block_size)
    blocks_per_seq = -(-max_len // block_size)
    layers = [config.layer(index) for index in range(config.num_layers)]
    if any(layer.attention_type == "linear" for layer in layers):
        raise ValueError(
            "init_paged_kv_caches_from_config: linear attention stores sums, not tokens; got attention_type=linear. "
            "Use init_decoder_kv_caches_from_config."
        )
    return tuple(
        init_paged_kv_cache(
            num_blocks=batch_size * blocks_per_seq if num_blocks is None else num_blocks,
            block_size=block_size,
            num_kv_heads=layer.kv_heads,
            head_dim=layer.head_size,
            value_dim=layer.value_head_size,
            batch_size=batch_size,
            max_blocks_per_seq=blocks_per_seq,
            dtype=layer.dtype if dtype is None else dtype,
        )
        for layer in layers
    )


def allocate_rows(cache: PagedKVCache, num_new_tokens: Int[ArrayLike, "B"] | Int[ArrayLike, ""] | int) -> PagedKVCache:
    """Gives every row the blocks that it lacks for its next tokens, from the blocks that no row holds.

    Rows are served in order, and get free blocks in the order of their ids. Once the pool is too small for a row, no
    later row that lacks blocks gets any: a small request does not overtake a large one.

    Args:
        cache: stays as it is; the result holds a new block table.
        num_new_tokens: integers (batch,), the tokens to come in each row beyond its length, or one number for all rows.

    Raises:
        ValueError: wrong shapes, or rows that cannot be served. Under jit the second cannot be raised: such a row
            keeps its blocks as they are and its `overflowed` is set.
    """
    num_new = _counts("allocate_rows", num_new_tokens, cache, cache.max_len)
    has_room = (num_new >= 0) & (num_new <= cache.max_len - cache.seq_lengths)
    missing = missing_blocks(cache.block_table, cache.seq_lengths + num_new, cache.block_size)
    missing = jnp.where(has_room, missing, 0)

    num_blocks = cache.key_pool.shape[0]
    # The index -1 would wrap around to the last block; num_blocks is out of range and dropped.
    held = jnp.where(cache.block_table >= 0, cache.block_table, num_blocks)
    free = jnp.ones(num_blocks, bool).at[held].set(False, mode="drop")
    num_free = free.sum(dtype=jnp.int32)
    (free_ids,) = jnp.nonzero(free, size=num_blocks, fill_value=-1)

    fits = has_room & ((missing == 0) | (jnp.cumsum(missing, dtype=jnp.int32) <= num_free))
    if is_concrete(fits) and not fits.all():
        raise ValueError(
            f"allocate_rows: every row must get its blocks; got num_new_tokens={num_new.tolist()} behind "
            f"seq_lengths={cache.seq_lengths.tolist()} with {num_free} free blocks of {cache.block_size} tokens and "
            f"max_len={cache.max_len}, too few for rows {np.flatnonzero(~fits).tolist()}. Free rows by free_rows, or "
            "make the pool or max_blocks_per_seq larger."
        )
    return dataclasses.replace(
        cache,
        block_table=give_blocks(cache.block_table, jnp.where(fits, missing, 0), free_ids),
        overflowed=cache.overflowed | ~fits,
    )


def append_rows(
    cache: PagedKVCache,
    keys_new: Float[ArrayLike, "B K T H"],
    values_new: Float[ArrayLike, "B K T Hv"],
    num_new_tokens: Int[ArrayLike, "B"] | Int[ArrayLike, ""] | int | None = None,
) -> PagedKVCache:
    """Writes tokens behind the last one of every row, into blocks that the rows were given before.

    Args:
        cache: stays as it is; the result is a new one (donate the old one under jit to write in place).
        keys_new: (batch, num_kv_heads, T, head_dim).
        values_new: (batch, num_kv_heads, T, value_dim).
        num_new_tokens: integers (batch,) or one number, how many of the T tokens are real, by default all. Padding is
            on the right and is not written.

    Raises:
        ValueError: shapes that do not fit the cache, or rows whose tokens would lie in an unallocated block. Under jit
            the latter cannot be raised: nothing is written in such a row and its `overflowed` is set.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from attnax.paged_cache import allocate_rows, append_rows, init_paged_kv_cache
        >>> @jax.jit
        ... def step(cache, keys, values, num_new_tokens):
        ...     return append_rows(allocate_rows(cache, num_new_tokens), keys, values, num_new_tokens)
        >>> cache = init_paged_kv_cache(
        ...     num_blocks=7, block_size=4, num_kv_heads=2, head_dim=3, batch_size=2, max_blocks_per_seq=3
        ... )
        >>> x = jnp.ones((2, 2, 6, 3))
        >>> cache = step(cache, x, x, jnp.array([5, 1]))
        >>> cache.seq_lengths.tolist(), cache.block_table.tolist()
        ([5, 1], [[0, 1, -1], [2, -1, -1]])
    """
    num_tokens = keys_new.shape[2] if keys_new.ndim > 2 else 0
    _check_tokens("append_rows", cache, {"keys": keys_new, "values": values_new}, num_tokens, suffix="_new")
    num_new_tokens = num_tokens if num_new_tokens is None else num_new_tokens
    num_new = _counts("append_rows", num_new_tokens, cache, num_tokens)
    is_count = (num_new >= 0) & (num_new <= num_tokens)
    fits = is_count & (missing_blocks(cache.block_table, cache.seq_lengths + num_new, cache.block_size) == 0)
    if is_concrete(fits) and not fits.all():
        raise ValueError(
            f"append_rows: every row must hold the blocks of its new tokens; got num_new_tokens={num_new.tolist()} "
            f"behind seq_lengths={cache.seq_lengths.tolist()}, which reach an unallocated block in rows "
            f"{np.flatnonzero(~fits).tolist()}. Call allocate_rows first."
        )
    num_new = jnp.where(fits, num_new, 0)
    table, start = cache.block_table, cache.seq_lengths
    return dataclasses.replace(
        cache,
        key_pool=write_tokens(cache.key_pool, table, start, jnp.asarray(keys_new), num_new),
        value_pool=write_tokens(cache.value_pool, table, start, jnp.asarray(values_new), num_new),
        seq_lengths=start + num_new,
        overflowed=cache.overflowed | ~fits,
    )


def gather_rows(cache: PagedKVCache) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"], Int[Array, "B"]]:
    """The tokens of every row in one piece, in the layout of attention functions.

    This copies batch * max_len tokens; `masks.padding(lengths)` keeps queries off the slots past each length.

    Args:
        cache: to read.

    Returns:
        Keys (batch, num_kv_heads, max_len, head_dim), values (batch, num_kv_heads, max_len, value_dim), both 0 past
        each row's length, and the lengths, int32 (batch,).
    """
    real = jnp.arange(cache.max_len, dtype=jnp.int32)[None] < cache.seq_lengths[:, None]

    def rows(pool: Pool) -> Array:
        # An unused entry, -1, reads the last block of the pool; these tokens lie past the length.
        return jnp.where(real[:, None, :, None], read_blocks(pool, cache.block_table), 0)

    return rows(cache.key_pool), rows(cache.value_pool), cache.seq_lengths


def free_rows(cache: PagedKVCache, rows: Bool[ArrayLike, "B"]) -> PagedKVCache:
    """Empties rows, so that their blocks are free again; the pools stay as they are.

    Args:
        cache: stays as it is; the result is a new one.
        rows: bool (batch,), True for the rows to empty.

    Raises:
        ValueError: rows of another shape or dtype.
    """
    shape, dtype = jnp.shape(rows), jnp.result_type(rows)
    if shape != cache.seq_lengths.shape or dtype != jnp.bool_:
        raise ValueError(
            f"free_rows: rows must be booleans of shape {cache.seq_lengths.shape}, True for a row to empty; "
            f"got shape={shape}, dtype={dtype}."
        )
    keep = ~jnp.asarray(rows)
    return dataclasses.replace(
        cache,
        block_table=jnp.where(keep[:, None], cache.block_table, -1),
        seq_lengths=jnp.where(keep, cache.seq_lengths, 0),
        overflowed=cache.overflowed & keep,
    )


def _check_tokens(
    caller: str, cache: PagedKVCache, new: Mapping[str, ArrayLike], num_new: int, suffix: str = ""
) -> None:
    """Raises ValueError unless the new tokens fit the pools and the rows of the cache."""
    keys, values = (jax.ShapeDtypeStruct((cache.num_rows, x.shape[0], 0, x.shape[1]), x.dtype) for x in cache.key_value)
    check_new_tokens(caller, {"keys": keys, "values": values}, new, num_new, suffix)


def _counts(caller: str, counts: Any, cache: PagedKVCache, limit: int) -> Array:
    """`num_new_tokens` as int32 (batch,); ValueError unless integers (batch,) or one, known ones within 0 ... limit."""
    batch = cache.block_table.shape[0]
    if is_concrete(counts):
        counts = np.asarray(counts)
    if counts.shape not in ((), (batch,)) or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"{caller}: num_new_tokens must be integers of shape ({batch},) or one integer; "
            f"got shape={counts.shape}, dtype={counts.dtype}."
        )
    if is_concrete(counts) and ((counts < 0) | (counts > limit)).any():
        raise ValueError(
            f"{caller}: num_new_tokens must lie between 0 and {limit}; got num_new_tokens={counts.tolist()}."
        )
    return jnp.broadcast_to(jnp.asarray(counts, jnp.int32), batch)
