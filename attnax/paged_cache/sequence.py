"""One sequence of a paged cache, outside jit, with a list of free blocks that the caller keeps."""

from __future__ import annotations

import dataclasses
from typing import Any, SupportsIndex

import jax.numpy as jnp
import numpy as np

from attnax.checks import is_concrete
from attnax.paged_cache.cache import PagedKVCache
from attnax.paged_cache.pool import give_blocks, missing_blocks, read_blocks, write_tokens
from attnax.typing import Array, ArrayLike, Float, Int

__all__ = ["allocate_blocks", "append_kv", "gather_kv"]


def allocate_blocks(
    cache: PagedKVCache,
    *,
    sequence_idx: SupportsIndex,
    num_new_tokens: SupportsIndex,
    free_block_ids: Int[ArrayLike, "F"],
) -> tuple[PagedKVCache, int]:
    """Gives one sequence the blocks that it lacks for `num_new_tokens` more, from the front of `free_block_ids`.

    Args:
        cache: stays as it is; the result holds a new block table.
        sequence_idx: row of the sequence.
        num_new_tokens: tokens to come, beyond its current length.
        free_block_ids: integers (F,), blocks that no sequence holds; keep `free_block_ids[used:]` for the next call.

    Returns:
        The cache and `used`, the number of blocks taken, an int: 0 if the sequence has enough blocks.

    Raises:
        ValueError: too few free blocks, tokens past `max_len`, an id that is no block of the pool, is given twice or
            is in use, a wrong index, or traced values. `allocate_rows` takes traced ones.
    """
    index, length, table = _sequence(
        "allocate_blocks", "allocate_rows", cache, sequence_idx, num_new_tokens, free_block_ids
    )
    free = _free_blocks(cache, free_block_ids)
    room = cache.max_len - length
    num_new = _integer("allocate_blocks", "num_new_tokens", num_new_tokens, room, f", the room past length={length}")
    used = int(missing_blocks(table, length + num_new, cache.block_size))
    if used > free.size:
        raise ValueError(
            f"allocate_blocks: sequence {index} needs {used} blocks for {num_new} new tokens; got {free.size} in "
            "free_block_ids. Free a sequence by free_rows, or make the pool larger."
        )
    taken = np.full(table.size, -1, np.int32)  # of one size: a shorter list compiles nothing new
    taken[:used] = free[:used]
    wanted = np.zeros(cache.block_table.shape[0], np.int32)
    wanted[index] = used
    return dataclasses.replace(cache, block_table=give_blocks(cache.block_table, wanted, taken)), used


def append_kv(
    cache: PagedKVCache,
    sequence_idx: SupportsIndex,
    keys_new: Float[ArrayLike, "T K H"],
    values_new: Float[ArrayLike, "T K Hv"],
) -> PagedKVCache:
    """Writes tokens behind the last one of one sequence, into blocks that the sequence was given before.

    Args:
        cache: stays as it is; the result holds new pools, so that each call copies them. `append_rows` under jit,
            with the cache donated, writes in place.
        sequence_idx: row of the sequence.
        keys_new: (new tokens, num_kv_heads, head_dim).
        values_new: (new tokens, num_kv_heads, value_dim).

    Raises:
        ValueError: a token would lie in an unallocated block, wrong shapes, a wrong index, or a traced cache or index.
            `append_rows` takes traced ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.paged_cache import allocate_blocks, append_kv, gather_kv, init_paged_kv_cache
        >>> cache = init_paged_kv_cache(
        ...     num_blocks=7, block_size=4, num_kv_heads=2, head_dim=3, batch_size=2, max_blocks_per_seq=3
        ... )
        >>> free = jnp.arange(7)
        >>> cache, used = allocate_blocks(cache, sequence_idx=1, num_new_tokens=5, free_block_ids=free)
        >>> free = free[used:]
        >>> cache = append_kv(cache, 1, jnp.ones((5, 2, 3)), jnp.ones((5, 2, 3)))
        >>> keys, values, length = gather_kv(cache, 1)
        >>> used, length, keys.shape
        (2, 5, (5, 2, 3))
    """
    index, length, table = _sequence("append_kv", "append_rows", cache, sequence_idx)
    num_new = keys_new.shape[0] if keys_new.ndim else 0
    for name, new, like in zip(("keys_new", "values_new"), (keys_new, values_new), cache.key_value, strict=True):
        want = (num_new, *like.shape)
        if new.shape != want:
            raise ValueError(
                f"append_kv: {name} must have shape (new tokens, num_kv_heads, size)={want}; got "
                f"{name}.shape={new.shape}."
            )
    if missing_blocks(table, length + num_new, cache.block_size):
        raise ValueError(
            f"append_kv: {num_new} new tokens behind length={length} reach an unallocated block; got blocks "
            f"{table[table >= 0].tolist()} of {cache.block_size} tokens for sequence {index}. "
            "Call allocate_blocks first."
        )
    start, count = np.array([length], np.int32), np.array([num_new], np.int32)
    return dataclasses.replace(
        cache,
        key_pool=write_tokens(cache.key_pool, table[None], start, jnp.swapaxes(keys_new, 0, 1)[None], count),
        value_pool=write_tokens(cache.value_pool, table[None], start, jnp.swapaxes(values_new, 0, 1)[None], count),
        seq_lengths=cache.seq_lengths.at[index].add(num_new),
    )


def gather_kv(
    cache: PagedKVCache, sequence_idx: SupportsIndex
) -> tuple[Float[Array, "S K H"], Float[Array, "S K Hv"], int]:
    """The tokens of one sequence in one piece.

    Args:
        cache: to read.
        sequence_idx: row of the sequence.

    Returns:
        Keys (length, num_kv_heads, head_dim), values (length, num_kv_heads, value_dim) and the length, an int.

    Raises:
        ValueError: a wrong index, or a traced cache or index. `gather_rows` takes traced ones.
    """
    _, length, table = _sequence("gather_kv", "gather_rows", cache, sequence_idx)
    blocks = jnp.asarray(table[None, : -(-length // cache.block_size)])
    keys, values = (read_blocks(pool, blocks)[0].swapaxes(0, 1) for pool in (cache.key_pool, cache.value_pool))
    return keys[:length], values[:length], length


def _free_blocks(cache: PagedKVCache, free_block_ids: Any) -> np.ndarray:
    """`free_block_ids` of `allocate_blocks` as an array; raises ValueError unless they are free blocks of the pool."""
    free = np.asarray(free_block_ids)
    if free.ndim != 1 or not np.issubdtype(free.dtype, np.integer):
        raise ValueError(
            f"allocate_blocks: free_block_ids must be integers in one axis; got shape={free.shape}, dtype={free.dtype}."
        )
    num_blocks = cache.key_pool.shape[0]
    if ((free < 0) | (free >= num_blocks)).any():
        raise ValueError(
            f"allocate_blocks: free_block_ids must lie between 0 and {num_blocks - 1}; got {free.tolist()}."
        )
    if np.unique(free).size < free.size:
        raise ValueError(f"allocate_blocks: free_block_ids must name each block once; got {free.tolist()}.")
    in_use = np.intersect1d(free, np.asarray(cache.block_table))
    if in_use.size:
        raise ValueError(
            f"allocate_blocks: free_block_ids must name blocks that no sequence holds; blocks {in_use.tolist()} are "
            f"already in use; got {free.tolist()}. Go on with free_block_ids[used:] after each call."
        )
    return free


def _sequence(
    caller: str, batched: str, cache: PagedKVCache, sequence_idx: Any, *numbers: Any
) -> tuple[int, int, Int[ArrayLike, "M"]]:
    """Index, length and block table of one sequence; ValueError if anything is traced or there is no such sequence."""
    if not all(map(is_concrete, (cache.block_table, cache.seq_lengths, sequence_idx, *numbers))):
        raise ValueError(
            f"{caller}: the block table, the lengths and all numbers must be known values; got traced ones. "
            f"Use {batched} under jit, which serves all rows at once."
        )
    index = _integer(caller, "sequence_idx", sequence_idx, cache.block_table.shape[0] - 1)
    return index, int(np.asarray(cache.seq_lengths)[index]), np.asarray(cache.block_table)[index]


def _integer(caller: str, name: str, value: Any, last: int, why: str = "") -> int:
    """`value` as an int; raises ValueError unless it is an integer between 0 and `last`."""
    integer = np.asarray(value)
    if integer.shape != () or not np.issubdtype(integer.dtype, np.integer) or not 0 <= int(integer) <= last:
        raise ValueError(f"{caller}: {name} must be an integer between 0 and {last}{why}; got {name}={value}.")
    return int(integer)
