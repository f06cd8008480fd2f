"""How a TPU kernel reads the blocks of a tile. What it computes is in `_core/tile.py`.

Vectors over queries or keys lie along the lanes, (1, n), as in memory; `Kernel.lay` turns one where it is needed.
Numbers for each row and head lie in scalar memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import JaxprEqn

from attnax.kernels._core.split import Read, Split, bind_in_float32
from attnax.kernels._core.tile import KernelSpec, QueryTile, TileKernel, TilePlace
from attnax.kernels._tpu.walk import Step, Walk
from attnax.typing import Array

__all__ = ["Inputs", "Kernel", "Known", "Spec", "Table", "rows_finite"]


class Table(NamedTuple):
    """How a captured array is read by query and key together."""

    slab: int  # which of `Known.slabs` has the number of the slab of each row and head
    of_pairs: bool  # the slab has an element for each pair, and comes in blocks; else it is small, in scalar memory


@dataclasses.dataclass(frozen=True, eq=False)
class Spec(KernelSpec):
    """The static part of a call, known when its kernels are traced."""

    walk: Walk
    mask_shapes: tuple[jax.ShapeDtypeStruct, ...]  # of the operands of the mask, in natural shapes
    mod_shapes: tuple[jax.ShapeDtypeStruct, ...]
    mask_tables: tuple[Table, ...]
    mod_tables: tuple[Table, ...]
    turned: tuple[bool, bool] = (False, False)  # whether keys, and values, lie as columns


class Known(NamedTuple):
    """References to scalar memory that is known before any block is copied."""

    words: Any  # see `Walk`
    any_non_finite: Any  # (B * K,) int32: whether a head holds a non-finite row; None if not computed
    slabs: tuple[Any, ...]  # each (B * N,) int32
    block_table: Any  # (B * num_kv * pages,) int32: the pages of each tile of keys, if keys are in pages


class Inputs(NamedTuple):
    """References to the blocks of a program."""

    query: Any  # (1, 1, T, H)
    key: Any  # (1, 1, S, H), or (1, 1, H, S) if `Spec.turned`, or a tuple of such pages
    value: Any  # (1, 1, S, V), likewise
    scale: Any  # (1,) float32, in scalar memory
    dropout: Any  # (4,) int32, in scalar memory, or None
    mask: tuple[Any, ...]  # operands: (1, 1, 1, T | S), or (B' * N',) in scalar memory
    mask_tables: tuple[Any, ...]  # (1, T, S), or (slabs * elements,) in scalar memory
    mod: tuple[Any, ...]
    mod_tables: tuple[Any, ...]
    positions: Any = None  # (1, 1, 1, T) and (1, 1, 1, S) int32, of queries and keys; None for 0, 1, ...
    d_out: Any = None  # (1, 1, T, V)
    lse: Any = None  # (1, 1, 1, T), see `QueryRows`
    delta: Any = None
    first: Any = None  # (2,) int32, in scalar memory: the first row and head of a shard; None for (0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel(TileKernel):
    """A call, and the references that one of its kernels reads."""

    spec: Spec
    known: Known
    inputs: Inputs

    def step(self) -> Step:
        """The place of this program. All tiles of a head with a non-finite row count as partial."""
        b, outer, n, inner = (pl.program_id(axis) for axis in range(4))
        step = self.spec.walk.step(self.known.words, b, outer, n, inner)
        if self.known.any_non_finite is None:
            return step._replace(is_partial=step.is_full | step.is_partial, is_full=None)
        any_non_finite = self.known.any_non_finite[b * self.spec.kv_heads + step.place.h // self.spec.shared] != 0
        is_partial = step.is_partial | (step.is_full & any_non_finite)
        return step._replace(is_full=step.is_full & ~any_non_finite, is_partial=is_partial)

    def visit(self, step: Step, visit: Callable[[bool], None]) -> None:
        """`visit(full)` if the program's tile is full or partial."""
        if step.is_full is not None:
            pl.when(step.is_full)(lambda: visit(True))
        pl.when(step.is_partial)(lambda: visit(False))

    def keys(self, place: TilePlace, *, full: bool = False) -> tuple[Array, Array, Array | None]:
        """The tile's keys and values, with zeros for non-finite ones, and True for each finite one; None for all."""
        blocks = self.inputs.key, self.inputs.value
        key, value = (_rows_of(x, turned=turned) for x, turned in zip(blocks, self.spec.turned, strict=True))
        if full:
            return key, value, None
        finite = rows_finite(key, value)
        kept = _inside(finite, place.j, self.spec.grid.seq_kv)
        return jnp.where(kept, key, 0), jnp.where(kept, value, 0), finite

    def queries(self, place: TilePlace, *, full: bool = False) -> QueryTile:
        """The tile's queries for the backward pass; all rows of a full tile are finite."""
        inputs, grid = self.inputs, self.spec.grid
        lse, delta = inputs.lse[0, 0], inputs.delta[0, 0]
        query, d_out = inputs.query[0, 0], inputs.d_out[0, 0]
        if not full:
            kept = _inside(~jnp.isnan(jnp.transpose(lse)), place.i, grid.seq_q)
            query, d_out = jnp.where(kept, query, 0), jnp.where(kept, d_out, 0)
            delta = jnp.where(_inside(jnp.full(delta.shape, True), place.i, grid.seq_q), delta, 0)
        return QueryTile(query, d_out, lse, delta)

    def index(self, place: TilePlace) -> tuple[Any, Any, Array, Array]:
        b, h, q, kv = super().index(place)
        first = self.inputs.first
        return (b, h, q, kv) if first is None else (b + first[0], h + first[1], q, kv)

    def lay(self, place: TilePlace, x: Array, *, of_queries: bool) -> Array:
        is_column = x.shape[1] == 1
        if is_column == (of_queries != place.turned):
            return x
        return jnp.transpose(x.astype(jnp.int32)) != 0 if x.dtype == jnp.bool_ else jnp.transpose(x)

    def indices(self, place: TilePlace, *, of_queries: bool) -> Array:
        grid = self.spec.grid
        first, block = (grid.q_first(place.i), grid.block_q) if of_queries else (grid.kv_first(place.j), grid.block_kv)
        shape = (block, 1) if of_queries != place.turned else (1, block)
        return first + lax.broadcasted_iota(jnp.int32, shape, shape.index(block))

    def positions(self, place: TilePlace, *, of_queries: bool) -> Array:
        if self.inputs.positions is None:
            return self.indices(place, of_queries=of_queries)
        return self.lay(place, self.inputs.positions[not of_queries][0, 0], of_queries=of_queries)

    def mask_operands(self, place: TilePlace) -> list[Array]:
        return self._cut(self.inputs.mask, self.spec.mask_shapes, place)

    def mod_operands(self, place: TilePlace) -> list[Array]:
        return self._cut(self.inputs.mod, self.spec.mod_shapes, place)

    def _cut(self, refs: tuple[Any, ...], shapes: tuple[Any, ...], place: TilePlace) -> list[Array]:
        cuts = []
        for ref, natural in zip(refs, shapes, strict=True):
            rows, heads, seq_q, seq_kv = natural.shape
            if seq_q > 1 or seq_kv > 1:
                x = self.lay(place, ref[0, 0], of_queries=seq_q > 1)
            else:
                x = ref[(place.b if rows > 1 else 0) * heads + (place.h if heads > 1 else 0)]
            cuts.append(_restored(x, natural.dtype))
        return cuts

    def load(self, function: Split, read: Read, where: list[Array], place: TilePlace) -> Array:
        n, of_mask = function.reads.index(read), function is self.spec.mask
        spec, inputs = self.spec, self.inputs
        table, ref = (
            (spec.mask_tables[n], inputs.mask_tables[n]) if of_mask else (spec.mod_tables[n], inputs.mod_tables[n])
        )
        if table.of_pairs:
            value = ref[0]
            if value.dtype == jnp.int8:  # Mosaic has no arithmetic of 8 bits
                value = value.astype(jnp.int32)
            return _restored(jnp.transpose(value) if place.turned else value, read.dtype)
        element, shape = self.element(read, where), self.shape(place)
        slab = self.known.slabs[table.slab][place.b * self.spec.score_shape[1] + place.h]
        start = slab * math.prod(read.shape[axis] for axis in read.axes)
        element = jnp.broadcast_to(element, shape)

        def choose(e: Any, total: Array) -> Array:
            return jnp.where(element == e, ref[start + e], total)

        total = lax.fori_loop(element.min(), element.max() + 1, choose, jnp.zeros(shape, ref.dtype))
        return _restored(total, read.dtype)

    def element(self, read: Read, where: list[Array]) -> Array:
        """The number of the element of a slab that each pair reads."""
        element: Any = jnp.int32(0)
        for axis in read.axes:
            element = element * read.shape[axis] + where[axis].astype(jnp.int32)
        return element

    def bind(self, eqn: JaxprEqn, values: list[Any]) -> Array:
        return _bind(eqn, values)

    def learned(self, learn: str | None) -> tuple[int, ...]:
        score_mod = self.spec.score_mod
        if score_mod is None or not learn:
            return ()
        if learn == "tables":
            return tuple(n for n, read in enumerate(score_mod.reads) if jnp.issubdtype(read.dtype, jnp.inexact))
        return tuple(
            n
            for n, x in enumerate(self.spec.mod_shapes)
            if jnp.issubdtype(x.dtype, jnp.inexact) and (x.shape[3] > 1) == (learn == "columns")
        )


def _rows_of(blocks: Any, *, turned: bool) -> Array:
    """The keys or values of a tile, from its block or its pages."""
    if isinstance(blocks, tuple) and len(blocks) > 1:
        return jnp.concatenate([_rows_of(page, turned=turned) for page in blocks])
    x = (blocks[0] if isinstance(blocks, tuple) else blocks)[0, 0]
    return jnp.transpose(x) if turned else x


def rows_finite(*arrays: Array) -> Array:
    """(rows, 1): True for each row that is finite in all arrays."""
    non_finite = [jnp.where(jnp.isfinite(x.astype(jnp.float32)), 0.0, 1.0).max(1, keepdims=True) for x in arrays]
    return functools.reduce(jnp.maximum, non_finite) == 0


def _inside(kept: Array, n: Any, length: int) -> Array:
    """`kept`, a vector over the rows of block n, without padding: the last block of an array reaches past its end."""
    block = max(kept.shape)
    if length % block == 0:
        return kept
    return kept & (n * block + lax.broadcasted_iota(jnp.int32, kept.shape, kept.shape.index(block)) < length)


def _restored(x: Any, dtype: Any) -> Any:
    """A number that was stored in 32 bits, or a boolean in 8, in its own dtype."""
    return x != 0 if dtype == jnp.bool_ else x if x.dtype == dtype else x.astype(dtype)


_ORDERS = "clamp", "ge", "gt", "le", "lt", "max", "min"


def _bind(eqn: JaxprEqn, values: list[Any]) -> Array:
    """The result of an elementwise equation, written with operations that Mosaic has for its dtype."""
    name, dtypes = eqn.primitive.name, {jnp.result_type(x) for x in values}
    if name == "copy":
        return jnp.asarray(values[0])
    if dtypes == {jnp.dtype(bool)}:  # no select, maximum or minimum of booleans
        if name in ("max", "min"):
            return values[0] | values[1] if name == "max" else values[0] & values[1]
        if name == "select_n":
            where, otherwise, x = values
            return (where & x) | (~where & otherwise)
    if name in _ORDERS and dtypes == {jnp.dtype("uint32")}:  # no order of unsigned numbers
        signed = [lax.bitcast_convert_type(jnp.asarray(x), jnp.int32) ^ jnp.int32(-(2**31)) for x in values]
        result = eqn.primitive.bind(*jnp.broadcast_arrays(*signed), **eqn.params)
        if result.dtype == jnp.bool_:
            return result
        return lax.bitcast_convert_type(result ^ jnp.int32(-(2**31)), jnp.uint32)
    return bind_in_float32(eqn, values)
