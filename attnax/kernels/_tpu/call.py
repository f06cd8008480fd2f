"""The arrays of a call as the TPU kernels take them: padded, in dtypes that Mosaic reads, with a code for each tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from attnax.kernels._core.captured import pair_axes
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.operands import Arrays
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.shards import Offset, auto_cut
from attnax.kernels._core.split import Split, split
from attnax.kernels._core.tile_codes import FULL
from attnax.kernels._core.tile_grid import TileGrid, tile_codes
from attnax.kernels._tpu.tile import Inputs, Known, Spec, Table
from attnax.kernels._tpu.tile_sizes import LANES, ROWS, grid_of
from attnax.kernels._tpu.walk import Walk, walk_of
from attnax.typing import Array

__all__ = ["Call", "on_shards", "padded", "prepare", "round_up"]

_Results = TypeVar("_Results")


class Call(NamedTuple):
    """The arrays of a call as the kernels take them, and where the blocks of a program lie in them.

    Lists by row and head are arrays (B | 1, N | K | 1) here, and in scalar memory flat.
    """

    spec: Spec
    known: Known
    inputs: Inputs
    codes: Array  # of all tiles, (B | 1, N | 1, num_q, num_kv)

    def walk(self, inner: int, *, turned: bool = False) -> tuple[Call, Array]:
        """The call with a list of its tiles, and the number of words in it."""
        walk, words, count = walk_of(self.codes, self.spec.score_shape[1] // inner, inner, turned=turned)
        spec = dataclasses.replace(self.spec, walk=walk)
        return self._replace(spec=spec, known=self.known._replace(words=words)), count

    def shard(self, known: Known, inputs: Inputs, codes: Array) -> Call:
        """The call of a device that has these of the arrays."""
        spec = self.spec

        def shapes(operands: tuple[Array, ...], whole: tuple[Any, ...]) -> tuple[Any, ...]:
            pairs = zip(operands, whole, strict=True)
            return tuple(jax.ShapeDtypeStruct((*x.shape[:2], *old.shape[2:]), old.dtype) for x, old in pairs)

        spec = dataclasses.replace(
            spec,
            score_shape=(*inputs.query.shape[:2], *spec.score_shape[2:]),
            kv_heads=jax.tree.leaves(inputs.key)[0].shape[1],
            mask_shapes=shapes(inputs.mask, spec.mask_shapes),
            mod_shapes=shapes(inputs.mod, spec.mod_shapes),
        )
        return Call(spec, known, inputs, codes)

    def flat(self) -> Call:
        """The call with lists for scalar memory."""
        known = jax.tree.map(lambda x: x.reshape(-1), self.known)
        mask, mod = (
            tuple(x.reshape(-1) if x.ndim == 2 else x for x in operands)
            for operands in (self.inputs.mask, self.inputs.mod)
        )
        return self._replace(known=known, inputs=self.inputs._replace(mask=mask, mod=mod))


def on_shards(run: Callable[[Call], _Results], call: Call) -> _Results:
    """`run(call)`, in a `shard_map` if a mesh with Auto axes is around the call: see `auto_cut`.

    Results have axes (B, N or K, ...). If `run` sums over one of these, the result has an element for each shard.
    """
    cut = auto_cut(call.spec.score_shape[0], call.spec.kv_heads).spec
    if cut is None:
        return run(call)

    def of(x: Array) -> P:  # (B | 1, N | K | 1, ...), or a list for all devices
        return P() if x.ndim == 1 else P(*(cut[axis] if x.shape[axis] > 1 else None for axis in (0, 1)))

    known, inputs, codes = jax.tree.map(of, (call.known, call.inputs, call.codes))
    inputs = inputs._replace(mask_tables=P(), mod_tables=P())
    if call.known.block_table is not None:
        pages = tuple(P(None, cut[1]) for _ in call.inputs.key)
        inputs = inputs._replace(key=pages, value=pages)

    def local(known: Known, inputs: Inputs, codes: Array) -> _Results:
        first = Offset.of(cut[0], cut[1], inputs.query)
        return run(call.shard(known, inputs._replace(first=jnp.stack([first.row, first.head])), codes))

    shards = jax.shard_map(local, in_specs=(known, inputs, codes), out_specs=cut, check_vma=False)
    return shards(call.known, call.inputs, call.codes)


class _Function(NamedTuple):
    """The mask or the score mod of a call, and what it captures."""

    split: Split | None
    operands: tuple[Array, ...] = ()
    shapes: tuple[Any, ...] = ()  # of the operands, (B | 1, N | 1, T | 1, S | 1), not padded
    tables: tuple[Array, ...] = ()  # an element for each read
    slabs: tuple[Array, ...] = ()
    of_pairs: tuple[bool, ...] = ()


def _function_of(
    lifted: Lifted | None, score_shape: tuple[int, int, int, int], lengths: tuple[int, int], positions: Any
) -> _Function:
    if lifted is None:
        return _Function(None)
    cut = split(lifted)
    natural = cut.compute_operands(lifted.values, score_shape, positions)
    operands = tuple(_operand(x, lengths) for x in natural)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in natural)
    reads = [_table_of(cut, read, lifted.values[read.table], score_shape, positions) for read in cut.reads]
    tables, slabs, of_pairs = zip(*reads, strict=True) if reads else ((), (), ())
    tables = tuple(
        padded(padded(x, lengths[0], 1), lengths[1], 2) if pairs else x
        for x, pairs in zip(tables, of_pairs, strict=True)
    )
    return _Function(cut, operands, shapes, tables, slabs, of_pairs)


def prepare(arrays: Arrays, setup: Setup, pages: Array | None = None) -> Call:
    """The arrays of a call as the kernels take them. Keys in pages are not tested for non-finite rows beforehand."""
    query, key, value, scale = arrays
    batch, heads, seq_q, _ = query.shape
    _, kv_heads, seq_kv, _ = key.shape
    if pages is not None:
        seq_kv *= pages.shape[1]
    score_shape, grid = (batch, heads, seq_q, seq_kv), grid_of(setup.tile, seq_q, seq_kv)
    rows = 1 if setup.tile.is_decoding else ROWS  # a cache is not copied
    lengths = max(round_up(seq_q, rows), grid.block_q), max(round_up(seq_kv, rows), grid.block_kv)
    codes = _codes(grid, setup, batch, heads)
    any_non_finite, block_table, turned = None, None, (False, False)
    if setup.tile.is_decoding:
        key, value, turned, block_table = _stored(key, value, pages, grid)
    else:  # a test of all stored keys beforehand would take as long as the attention
        # Over both axes at once: libtpu takes 8 s more for rows first, where their number is no multiple of 8.
        finite = jnp.isfinite(key).all((2, 3)) & jnp.isfinite(value).all((2, 3))
        any_non_finite = (~finite).astype(jnp.int32)
        key, value = padded(key, lengths[1], 2), padded(value, lengths[1], 2)
    mask, score_mod = (_function_of(x, score_shape, lengths, setup.positions) for x in (setup.mask, setup.score_mod))
    positions = None
    if setup.positions is not None:
        positions = tuple(padded(x[None, None, None], n, 3) for x, n in zip(setup.positions, lengths, strict=True))
    inputs = Inputs(
        padded(query, lengths[0], 2),
        key,
        value,
        jnp.asarray(scale, jnp.float32).reshape(1),
        setup.words,
        mask.operands,
        mask.tables,
        score_mod.operands,
        score_mod.tables,
        positions,
    )
    count = len(mask.slabs)
    spec = Spec(
        score_shape,
        kv_heads,
        grid,
        setup.tile,
        mask.split,
        score_mod.split,
        setup.dropout_rate,
        setup.learn_scale,
        setup.interpret,
        Walk((1, 1, 0), 0, 1, turned=False),
        mask.shapes,
        score_mod.shapes,
        tuple(Table(n, x) for n, x in enumerate(mask.of_pairs)),
        tuple(Table(count + n, x) for n, x in enumerate(score_mod.of_pairs)),
        turned,
    )
    known = Known(None, any_non_finite, mask.slabs + score_mod.slabs, block_table)
    return Call(spec, known, inputs, codes)


def _stored(key: Array, value: Array, pages: Array | None, grid: TileGrid) -> tuple[Any, ...]:
    """(key, value, `Spec.turned`, `Known.block_table`) of the tokens of a cache.

    XLA keeps an argument of a program whose rows do not fill registers as columns. The kernel reads these, so that no
    cache is copied.
    """
    page, turned = key.shape[2], tuple(x.shape[3] % LANES != 0 for x in (key, value))
    key, value = (x.swapaxes(2, 3) if turns else x for x, turns in zip((key, value), turned, strict=True))
    if pages is None:
        return key, value, turned, None
    count = grid.block_kv // page  # pages of a tile
    # What lies in place of a missing page is read but not attended.
    table = padded(jnp.maximum(pages, 0).astype(jnp.int32), grid.num_kv * count, 1)[:, None]
    return (key,) * count, (value,) * count, turned, table


def _codes(grid: TileGrid, setup: Setup, batch: int, heads: int) -> Array:
    """The codes of all tiles. Without a mask all tiles are full but the last ones, if these reach past the end."""
    if setup.mask is not None:
        options: dict[str, Any] = {"is_opaque": setup.is_opaque, "positions": setup.positions}
        codes = tile_codes(grid, batch, heads, setup.bounds, setup.mask, **options)
        return jnp.broadcast_to(codes, (*codes.shape[:2], grid.num_q, grid.num_kv))
    last_q = (np.arange(grid.num_q) == grid.num_q - 1) & (not grid.even_q)
    last_kv = (np.arange(grid.num_kv) == grid.num_kv - 1) & (not grid.even_kv)
    return jnp.asarray(np.where(last_q[:, None] | last_kv, FULL + 1, FULL)[None, None], jnp.int32)


def _table_of(
    cut: Split, read: Any, values: Array, score_shape: tuple[int, int, int, int], positions: Any
) -> tuple[Array, Array, bool]:
    """(table, the slab of each row and head (B, N) int32, whether a slab has an element for each pair).

    The table is (slabs, T, S) in an order of its axes that has queries before keys, or (slabs * elements,).
    """
    batch, heads = score_shape[:2]
    index = cut.index_in_bounds(read, score_shape)
    pairs = None if positions is not None else pair_axes(read, index, score_shape)
    inner = read.axes if pairs is None else pairs
    outer = [axis for axis in range(len(read.shape)) if axis not in inner]
    slab: Any = np.zeros((batch, heads, 1, 1), np.int32)
    for axis in outer:
        slab = slab * read.shape[axis] + index[axis]
    slab = np.broadcast_to(slab, (batch, heads, 1, 1))[:, :, 0, 0]
    table = _in_32_bits(values, of_pairs=pairs is not None).transpose(*outer, *inner)
    sizes = [read.shape[axis] for axis in inner]
    table = table.reshape(-1, *sizes) if pairs is not None else table.reshape(-1)
    return table, jnp.asarray(slab, jnp.int32), pairs is not None


def _operand(x: Array, lengths: tuple[int, int]) -> Array:
    """An operand (B', N', T | 1, S | 1) as kernels read it: (B', N', 1, T | S), or (B', N') for scalar memory."""
    rows, heads, seq_q, seq_kv = x.shape
    x = _in_32_bits(x, of_pairs=False)
    if seq_q == seq_kv == 1:
        return x[:, :, 0, 0]
    return padded(x.reshape(rows, heads, 1, -1), lengths[seq_q == 1], 3)


def _in_32_bits(x: Array, *, of_pairs: bool) -> Array:
    """Numbers in a dtype that scalar memory and vectors of one row hold; booleans of pairs stay small."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int8 if of_pairs else jnp.int32)
    if x.dtype.itemsize == 4 or (of_pairs and x.dtype == jnp.bfloat16):
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def round_up(n: int, multiple: int) -> int:
    """`n`, rounded up."""
    return -(-n // multiple) * multiple


def padded(x: Array, length: int, axis: int, fill: Any = 0) -> Array:
    """`x`, padded to `length` along an axis."""
    missing = [(0, max(0, length - size) if axis == n else 0) for n, size in enumerate(x.shape)]
    return jnp.pad(x, missing, constant_values=fill) if any(after for _, after in missing) else x
