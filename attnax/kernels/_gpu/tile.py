"""How a GPU kernel reads the arrays of a tile, and writes them. What it computes is in `_core/tile.py`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import JaxprEqn

from attnax.kernels._core.split import Read, Split, bind_in_float32
from attnax.kernels._core.tile import KernelSpec, QueryTile, TileKernel, TilePlace
from attnax.kernels._core.tile_codes import EMPTY
from attnax.kernels._gpu.tile_lists import TileList
from attnax.typing import Array

__all__ = ["Inputs", "Kernel", "either", "rows_finite"]


class Inputs(NamedTuple):
    """The operands of the kernels: arrays outside, references inside; lengths are at least those of a tile."""

    query: Any  # (B, N, T, H)
    key: Any  # (B, K, S, H)
    value: Any  # (B, K, S, V)
    scale: Any  # (1,) float32
    tiles: TileList | None  # for each tile of queries; None if all are full
    turned: TileList | None  # for each tile of keys
    codes: Any  # (B', N', num_q, num_kv), or None
    any_non_finite: Any  # (B, K) int32: whether a head holds a non-finite row; None if not computed
    finite: Any  # (B, K, S) int32: which keys and values are finite; None if not computed: the kernel tests them
    dropout: Any  # (4,) uint32, or None
    mask: tuple[Any, ...]  # operands of the mask, (B', N', T', S')
    mask_tables: tuple[Any, ...]  # the arrays that the mask loads from, one for each read
    mod: tuple[Any, ...]
    mod_tables: tuple[Any, ...]
    d_out: Any = None  # (B, N, T, V)
    lse: Any = None  # (B, N, T) in units of log 2; +inf where nothing is attended, NaN in a contaminated row
    delta: Any = None  # (B, N, T), see `softmax.tile_gradients`
    positions: Any = None  # (T,) and (S,) int32, of queries and keys, for masks and score mods; None for 0, 1, ...
    block_table: Any = None  # (B, num_kv) int32: the page of a tile of keys, if key and value are pools (P, K, page, H)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel(TileKernel):
    """A call, and the references that one of its kernels reads. Vectors have one axis."""

    spec: KernelSpec
    inputs: Inputs

    def own(self, n: Any, *, of_queries: bool) -> Array | None:
        """True for the queries, or keys, of a tile that no earlier tile holds; None for all."""
        grid = self.spec.grid
        if of_queries:
            first, block, is_alone = self.spec.grid.q_first(n), grid.block_q, grid.even_q or grid.num_q == 1
        else:
            first, block, is_alone = self.spec.grid.kv_first(n), grid.block_kv, grid.even_kv or grid.num_kv == 1
        return None if is_alone else first + jnp.arange(block, dtype=jnp.int32) >= n * block

    def write(self, ref: Any, where: tuple[Any, ...], x: Array, own: Array | None) -> None:
        """Writes only the program's own rows of `x`: another program might write other last bits."""
        if own is None or self.spec.interpret:
            ref[where] = x
            return
        from jax.experimental.pallas import triton  # as in `load`

        mask = own if own.ndim == x.ndim else own[:, None]
        triton.store(ref.at[where], x, mask=jnp.broadcast_to(mask, x.shape))

    def load_rows(self, ref: Any, where: tuple[Any, ...], rows: Array | None) -> Array:
        """A matrix of an array, with zeros where `rows` is False; None loads all rows."""
        if rows is None:
            return ref[where]
        if self.spec.interpret:
            return jnp.where(rows[:, None], ref[where], 0)
        from jax.experimental.pallas import triton  # not every JAX has it, and interpreted kernels do without

        return triton.load(ref.at[where], mask=jnp.broadcast_to(rows[:, None], (rows.size, ref.shape[-1])), other=0)

    def keys(self, place: TilePlace, *, full: bool = False) -> tuple[Array, Array, Array | None]:
        """The tile's keys and values, with zeros for non-finite ones, and True for each finite one: None for all."""
        kv_head, inputs = place.h // self.spec.shared, self.inputs
        columns = place.b, kv_head, pl.ds(self.spec.grid.kv_first(place.j), self.spec.grid.block_kv)
        where: tuple[Any, ...] = (*columns, slice(None))
        if inputs.block_table is not None:
            where = jnp.maximum(inputs.block_table[place.b, place.j], 0), kv_head, slice(None), slice(None)
        finite = None if full or inputs.finite is None else inputs.finite[columns] != 0
        key, value = (self.load_rows(ref, where, finite) for ref in (inputs.key, inputs.value))
        if not full and finite is None:
            finite = rows_finite(key, value)
            key, value = (jnp.where(finite[:, None], x, 0) for x in (key, value))
        return key, value, finite

    def queries(self, place: TilePlace, *, full: bool = False) -> QueryTile:
        """The tile's queries for the backward pass; all rows of a full tile are finite."""
        inputs, rows = self.inputs, (place.b, place.h, pl.ds(self.spec.grid.q_first(place.i), self.spec.grid.block_q))
        lse = inputs.lse[rows]
        finite = None if full else ~jnp.isnan(lse)
        query, d_out = (self.load_rows(ref, (*rows, slice(None)), finite) for ref in (inputs.query, inputs.d_out))
        return QueryTile(query, d_out, lse, inputs.delta[rows])

    def lay(self, place: TilePlace, x: Array, *, of_queries: bool) -> Array:
        return x[:, None] if of_queries != place.turned else x[None, :]

    def indices(self, place: TilePlace, *, of_queries: bool) -> Array:
        grid = self.spec.grid
        first, block = (grid.q_first(place.i), grid.block_q) if of_queries else (grid.kv_first(place.j), grid.block_kv)
        return self.lay(place, first + jnp.arange(block, dtype=jnp.int32), of_queries=of_queries)

    def positions(self, place: TilePlace, *, of_queries: bool) -> Array:
        grid = self.spec.grid
        if of_queries:
            first, block, length = grid.q_first(place.i), grid.block_q, grid.seq_q
        else:
            first, block, length = grid.kv_first(place.j), grid.block_kv, grid.seq_kv
        if self.inputs.positions is not None:
            x = self.inputs.positions[not of_queries][pl.ds(first, block)]
            return self.lay(place, x, of_queries=of_queries)
        index = self.indices(place, of_queries=of_queries)
        return index if length >= block else jnp.minimum(index, length - 1)

    def mask_operands(self, place: TilePlace) -> list[Array]:
        mask = self.spec.mask
        return [] if mask is None else self._cut(self.inputs.mask, mask.operands, place)

    def mod_operands(self, place: TilePlace) -> list[Array]:
        score_mod = self.spec.score_mod
        return [] if score_mod is None else self._cut(self.inputs.mod, score_mod.operands, place)

    def _cut(self, refs: tuple[Any, ...], variables: tuple[Any, ...], place: TilePlace) -> list[Array]:
        """The operands of a mask or score mod at a tile, in natural shapes."""
        cuts = []
        for ref, var in zip(refs, variables, strict=True):
            rows, heads, seq_q, seq_kv = ref.shape
            where = (place.b if rows > 1 else 0, place.h if heads > 1 else 0)
            if seq_q > 1:
                x = ref[(*where, pl.ds(self.spec.grid.q_first(place.i), self.spec.grid.block_q), 0)]
                x = self.lay(place, x, of_queries=True)
            elif seq_kv > 1:
                x = ref[(*where, 0, pl.ds(self.spec.grid.kv_first(place.j), self.spec.grid.block_kv))]
                x = self.lay(place, x, of_queries=False)
            else:
                x = ref[(*where, 0, 0)]
            cuts.append(x != 0 if var.aval.dtype == jnp.bool_ else x)
        return cuts

    def load(self, function: Split, read: Read, where: list[Array], place: TilePlace) -> Array:
        tables = self.inputs.mask_tables if function is self.spec.mask else self.inputs.mod_tables
        value = tables[function.reads.index(read)][tuple(jnp.broadcast_arrays(*where))]
        return value != 0 if read.dtype == jnp.bool_ else value

    def bind(self, eqn: JaxprEqn, values: list[Any]) -> Array:
        return bind_in_float32(eqn, values)  # Triton has no division and no functions of 16-bit floats

    def learned(self, learn: str | None) -> tuple[int, ...]:
        """The numbers of the floating operands, or reads, of the score mod that `learn` names."""
        refs = self.inputs.mod_tables if learn == "tables" else self.inputs.mod if learn else ()
        chosen = [n for n, ref in enumerate(refs) if jnp.issubdtype(ref.dtype, jnp.inexact)]
        return tuple(n for n in chosen if learn == "tables" or (refs[n].shape[3] > 1) == (learn == "columns"))

    def is_visited(self, place: TilePlace) -> Any:
        """1 for a full or partial tile, 0 for an empty tile."""
        codes = self.inputs.codes
        if codes is None:
            return 1
        rows, heads = codes.shape[:2]
        code = codes[place.b if rows > 1 else 0, place.h if heads > 1 else 0, place.i, place.j]
        return either(code == EMPTY, 0, 1)

    def no_full_tiles(self, b: Any, h: Any) -> Any:
        """Whether every tile of the head counts as partial; None if all tiles of all heads are partial."""
        any_non_finite = self.inputs.any_non_finite
        return None if any_non_finite is None else any_non_finite[b, h // self.spec.shared] != 0


def either(condition: Any, x: Any, otherwise: Any) -> Any:
    """`jnp.where` of two integers. Lowered to Triton, a Python number would get the dtype of the condition."""
    return jnp.where(condition, jnp.int32(x), jnp.int32(otherwise))


def rows_finite(*arrays: Array) -> Array:
    """True for each row that is finite in all arrays."""
    non_finite = [jnp.where(jnp.isfinite(x.astype(jnp.float32)), 0, 1).max(1) for x in arrays]
    return functools.reduce(jnp.maximum, non_finite) == 0
