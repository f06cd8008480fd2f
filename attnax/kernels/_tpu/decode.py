"""A few queries over stored tokens in a TPU kernel: its choice and its launch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnax.kernels._core import softmax
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.natural import TPU_ELEMENTWISE
from attnax.kernels._tpu.prepare import MOST_WORDS, count_numbers, why_not_function
from attnax.kernels._tpu.tile_sizes import LANES, LARGEST_HEAD, Tile, choose, grid_of
from attnax.typing import Array

__all__ = ["attend", "decode_tile"]

_MOST_PAGES = 16  # that a tile takes, each a block of its own
_MOST_KEYS = 2048  # in a tile


def attend(
    inputs: DecodeInputs, mask: Lifted | None, score_mod: Lifted | None, *, interpret: bool = False
) -> tuple[Array, Array] | None:
    """(out, natural log-sum-exp) in float32, from the kernel; None if the kernel does not serve the call.

    Mask and score mod see true positions. `interpret` runs the kernel as ordinary JAX.
    """
    tile = decode_tile(inputs)
    if tile is None or jax.dtypes.canonicalize_dtype(np.int64) == np.int64:  # kernels count in 32 bits
        return None
    setup = inputs.setup(tile, mask, score_mod, TPU_ELEMENTWISE, interpret=interpret)
    if setup is None:
        return None
    (batch, heads, seq_q, _), capacity = inputs.query.shape, inputs.tokens.positions.shape[1]
    score_shape = batch, heads, seq_q, capacity
    functions = [function for function in (setup.mask, setup.score_mod) if function is not None]
    if any(why_not_function(function, score_shape, has_positions=False) for function in functions):
        return None
    if not _fits_scalar_memory(inputs, tile, functions, has_mask=mask is not None):
        return None
    from attnax.kernels._tpu import launch  # imports Pallas, which takes long and is seldom needed

    out, lse = launch.decode(inputs.arrays, setup, inputs.tokens.block_table)
    return out, softmax.in_nats(lse)


def decode_tile(inputs: DecodeInputs) -> Tile | None:
    """The tile, with the keys of some whole pages; None if the kernel cannot read the arrays without a copy."""
    query, tokens = inputs.query, inputs.tokens
    shapes = query.shape, tokens.keys.shape, tokens.values.shape, tokens.positions.shape
    if not all(isinstance(size, int) and size for shape in shapes for size in shape):  # a symbol, or nothing
        return None
    sizes = tokens.keys.shape[-1], tokens.values.shape[-1]
    dtypes = {query.dtype, tokens.keys.dtype, tokens.values.dtype}
    if len(dtypes) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16) or max(sizes) > LARGEST_HEAD:
        return None
    tile = choose("decode", max(sizes), query.dtype.itemsize * 8)
    if tokens.block_table is None:
        return tile
    page = tokens.keys.shape[2]
    # XLA keeps small pages whose rows do not fill registers in an order that no kernel can read.
    if page % (LANES if any(size % LANES for size in sizes) else 32 // query.dtype.itemsize):
        return None
    # Vectors over keys come in blocks of full registers.
    least = math.lcm(page, LANES)
    most = max(least, min(tile.block_kv // least * least, _MOST_PAGES * page // least * least))
    block_kv = min(most, tokens.positions.shape[1])
    return tile._replace(block_kv=block_kv) if block_kv <= min(_MOST_KEYS, _MOST_PAGES * page) else None


def _fits_scalar_memory(inputs: DecodeInputs, tile: Tile, functions: list[Lifted], *, has_mask: bool) -> bool:
    """Whether scalar memory holds the list of tiles, the block table and the small tables."""
    (batch, heads, seq_q, _), capacity = inputs.query.shape, inputs.tokens.positions.shape[1]
    grid = grid_of(tile, seq_q, capacity)
    words = batch * (inputs.tokens.keys.shape[1] if has_mask else 1) * grid.num_q * grid.num_kv
    if inputs.tokens.block_table is not None:
        words += batch * grid.num_kv * (tile.block_kv // inputs.tokens.keys.shape[2])
    score_shape = batch, heads, seq_q, capacity
    words += sum(count_numbers(function, score_shape, has_positions=False) for function in functions)
    return words <= MOST_WORDS
