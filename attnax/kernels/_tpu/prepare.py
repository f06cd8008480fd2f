"""Gives the tiles of the TPU kernels for a call, or the reason why the kernels do not serve it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from attnax.kernels._core.captured import pair_axes
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.natural import TPU_ELEMENTWISE
from attnax.kernels._core.operands import Arrays, Operands
from attnax.kernels._core.programs import dtype_of
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.shards import auto_cut
from attnax.kernels._core.split import Read, Split, split, why_not_split
from attnax.kernels._core.tile_grid import tile_codes
from attnax.kernels._tpu.tile_sizes import LANES, LARGEST_HEAD, Tile, choose, grid_of

__all__ = [
    "MOST_WORDS",
    "TpuTiles",
    "choose_tpu_tiles",
    "count_numbers",
    "tpu_tile",
    "why_not_function",
    "why_not_tpu_kernels",
]

# The most elements of a table that a tile reads by query and key together: each is a pass over the tile.
_SMALL_TABLE = 256
_MOST_NUMBERS = 2**16  # of the tables in scalar memory
MOST_WORDS = 2**16  # of a list of tiles in scalar memory
_NUMBERS = {jnp.dtype(name) for name in ("bool", "int32", "uint32", "float32", "bfloat16")}


class TpuTiles(NamedTuple):
    """Tiles of the kernels, forward and backward."""

    plain: tuple[Tile, Tile]
    busy: tuple[Tile, Tile]  # for kernels that read a small table for each pair


def choose_tpu_tiles(query: Any, value: Any, block_size: Any) -> TpuTiles | None:
    """Tiles for arrays of these shapes; None if the kernels do not serve these arrays."""
    size = max(query.shape[-1], value.shape[-1])
    if query.dtype not in (jnp.float32, jnp.bfloat16) or size > LARGEST_HEAD:
        return None
    if not isinstance(query.shape[0], int):  # Pallas makes no blocks of a symbolic batch
        return None
    block_q, block_kv = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    bits = query.dtype.itemsize * 8

    def both(*, busy: bool) -> tuple[Tile, Tile]:
        forward, backward = (choose(kind, size, bits, busy=busy) for kind in ("forward", "backward"))
        asked = {name: x for name, x in (("block_q", block_q), ("block_kv", block_kv)) if x is not None}
        return forward._replace(**asked), backward._replace(**asked)

    return TpuTiles(both(busy=False), both(busy=True))


def tpu_tile(tiles: TpuTiles, operands: Operands, dropout_rate: float, *, backward: bool) -> Tile:
    """The tile of a pass."""
    reads = (read for x in (operands.mask, operands.score_mod) if x is not None for read in split(x).reads)
    is_busy = any(math.prod(read.shape[axis] for axis in read.axes) <= _SMALL_TABLE for read in reads)
    return (tiles.busy if is_busy else tiles.plain)[backward]


def why_not_tpu_kernels(tiles: TpuTiles | None, arrays: Arrays, operands: Operands, *, is_part: bool) -> str | None:
    """The reason why the kernels do not serve a call, or None."""
    if tiles is None:
        return f"TPU kernels take float32 and bfloat16, heads of at most {LARGEST_HEAD} and no symbolic batch"
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return "TPU kernels count in 32 bits, and JAX in 64 here"
    for tile in tiles.plain:
        for size in (tile.block_q, tile.block_kv):
            if size % LANES:
                return f"tiles of TPU kernels are multiples of {LANES}; got {size}"
    (batch, heads, seq_q, _), seq_kv = arrays[0].shape, arrays[1].shape[2]
    score_shape = batch, heads, seq_q, seq_kv
    numbers = 0
    for name, function in (("mask", operands.mask), ("score mod", operands.score_mod)):
        if function is not None:
            reason = why_not_function(function, score_shape, has_positions=is_part)
            if reason is not None:
                return f"no TPU kernel can hold this {name}: {reason}"
            numbers += count_numbers(function, score_shape, has_positions=is_part)
            numbers += batch * heads * len(split(function).reads)  # the number of a table's slab
    if numbers > _MOST_NUMBERS:
        return f"tables and their numbers take at most {_MOST_NUMBERS} words of a TPU's scalar memory; got {numbers}"
    for backward in (False, True):
        count = _count_words(tpu_tile(tiles, operands, 0.0, backward=backward), arrays, operands, is_part=is_part)
        if count > MOST_WORDS:
            return f"TPU kernels list at most {MOST_WORDS} tiles of all rows and heads; got {count}"
    return None


def _count_words(tile: Tile, arrays: Arrays, operands: Operands, *, is_part: bool) -> int:
    """The words of the list of tiles on a device: a list for each row and head only where the mask tells them apart."""
    (batch, heads, seq_q, _), (_, kv_heads, seq_kv, _) = arrays[0].shape, arrays[1].shape
    grid, shard = grid_of(tile, seq_q, seq_kv), auto_cut(batch, kv_heads)
    rows, columns = shard.batch, shard.kv_heads * (heads // kv_heads)
    count, mask = grid.num_q * grid.num_kv, operands.mask
    if mask is None or count * rows * columns <= MOST_WORDS:
        return count if mask is None else count * rows * columns
    setup = Setup.of(tile, operands, 0.0, learn_scale=False, is_part=is_part, interpret=False)
    options: dict[str, Any] = {"is_opaque": setup.is_opaque, "positions": setup.positions}
    codes = jax.eval_shape(lambda: tile_codes(grid, batch, heads, setup.bounds, mask, **options))
    return count * (rows if codes.shape[0] > 1 else 1) * (columns if codes.shape[1] > 1 else 1)


def why_not_function(function: Lifted, score_shape: tuple[int, int, int, int], *, has_positions: bool) -> str | None:
    """The reason why no TPU kernel can hold a mask or score mod, or None.

    Args:
        function: traced.
        score_shape: (B, N, T, S).
        has_positions: whether the indices of queries and keys are not 0, 1, ...
    """
    reason = why_not_split(function, TPU_ELEMENTWISE)
    if reason is not None:
        return reason
    cut = split(function)
    odd = _odd_dtype(cut.inside)
    if odd is not None:
        return odd
    for read in cut.reads:
        size = _size(function, read, score_shape, has_positions)
        if size is None or size > _SMALL_TABLE:
            return (
                f"a captured array of shape {read.shape} that is read by query and key together, neither at [q, kv] "
                f"nor at one of at most {_SMALL_TABLE} elements"
            )
    return None


def count_numbers(function: Lifted, score_shape: tuple[int, int, int, int], *, has_positions: bool) -> int:
    """The elements of the small tables that a mask or score mod keeps in scalar memory; arguments as above."""
    return sum(
        math.prod(read.shape) for read in split(function).reads if _size(function, read, score_shape, has_positions)
    )


def _size(function: Lifted, read: Read, score_shape: tuple[int, int, int, int], has_positions: bool) -> int | None:
    """The elements that a pair may read: 0 for one of its own, None if the rest of the index is not simple."""
    cut: Split = split(function)
    index = cut.index_of(read, score_shape)
    if any(index[axis] is None for axis in range(len(read.shape)) if axis not in read.axes):
        return None
    axes = None if has_positions else pair_axes(read, index, score_shape)
    if axes is not None and all(read.shape[a] >= score_shape[n] for a, n in zip(axes, (2, 3), strict=True)):
        return 0
    return math.prod(read.shape[axis] for axis in read.axes)


def _odd_dtype(equations: Iterable[JaxprEqn]) -> str | None:
    """The first operation on numbers that a TPU kernel does not compute with, or None."""
    for eqn in equations:
        name = eqn.primitive.name
        for dtype in {dtype_of(var) for var in (*eqn.invars, *eqn.outvars)} - _NUMBERS:
            is_cast = name in ("convert_element_type", "gather") and dtype.itemsize < 4 and dtype != jnp.float16
            if not is_cast:
                return f"{name} of {dtype}"
    return None
