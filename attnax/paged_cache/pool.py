"""Blocks of a pool and the rows of a block table that name them, as arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.int8_rows import Int8Rows, decode_rows, encode_rows
from attnax.typing import Array

__all__ = ["Pool"]

Pool = Array | Int8Rows
"""Blocks of vectors, as numbers or as 8-bit integers with scales."""


def missing_blocks(block_table: Any, num_tokens: Any, block_size: int) -> Any:
    """The number of blocks that rows lack for `num_tokens` in all, as a NumPy or JAX array like the arguments."""
    return (-(-num_tokens // block_size) - _num_held(block_table)).clip(0)


def _num_held(block_table: Any) -> Any:
    """The number of blocks that rows hold, as a NumPy or JAX array like the argument."""
    return (block_table >= 0).sum(-1, dtype=np.int32)


@jax.jit  # eager callers then start one program, not one for each operation
def give_blocks(block_table: Array, num_blocks: Array, free_ids: Array) -> Array:
    """The table with `num_blocks` (B,) more blocks in each row, from the front of `free_ids`, to rows in order."""
    # For each column of the table, the number of the row's new block that goes there.
    nth = jnp.arange(block_table.shape[1], dtype=jnp.int32)[None] - _num_held(block_table)[:, None]
    first = jnp.cumsum(num_blocks, dtype=jnp.int32) - num_blocks
    ids = free_ids.at[first[:, None] + nth].get(mode="fill", fill_value=-1)
    return jnp.where((nth >= 0) & (nth < num_blocks[:, None]), ids.astype(block_table.dtype), block_table)


@jax.jit
def write_tokens(pool: Pool, table: Array, start: Array, new: Array, num_new: Array) -> Pool:
    """The pool with the first `num_new` (R,) of the tokens `new` (R, K, T, H) from position `start` (R,) on.

    Rows hold the blocks for them, in `table` (R, M).
    """
    num_blocks, _, block_size, _ = pool.shape
    steps = jnp.arange(new.shape[2], dtype=jnp.int32)[None]
    positions = start[:, None] + steps
    blocks = jnp.take_along_axis(table, positions // block_size, axis=1, mode="clip")
    # Padding goes to a block out of range, which drops it; -1 would wrap around to the last block.
    blocks = jnp.where(steps < num_new[:, None], blocks, num_blocks)
    offsets = positions % block_size
    return jax.tree.map(
        lambda held, new: held.at[blocks, :, offsets].set(new.swapaxes(1, 2), mode="drop"), pool, encode_rows(new, pool)
    )


def read_blocks(pool: Pool, blocks: Array) -> Array:
    """The tokens of `blocks` (R, M), each row's in one axis: (R, K, M * block_size, H)."""
    heads = jnp.arange(pool.shape[1], dtype=jnp.int32)[None, :, None]
    read = decode_rows(jax.tree.map(lambda x: x[blocks[:, None], heads], pool), pool.dtype)
    return read.reshape(blocks.shape[0], pool.shape[1], -1, pool.shape[3])
