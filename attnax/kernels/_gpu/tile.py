"""A tile of pairs inside a GPU kernel: its arrays, its mask and score mod, its scores and their gradients.

A full tile needs no mask test; any other tile is partial. The kernels that visit tiles are in `_gpu/kernels.py`. The
mathematics of a tile comes from `_core/softmax.py`, and masks and score mods come from `_gpu/split.py`.

A non-finite row or key must contaminate only the rows that attend it. If `any_non_finite` is set for a head, all tiles
of the head count as partial: a partial tile does not load non-finite keys, and their scores are NaN.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.tile_codes import EMPTY
from attnax.kernels._gpu.split import Read, Split
from attnax.kernels._gpu.tile_lists import TileGrid, TileList
from attnax.kernels._gpu.tile_sizes import Tile
from attnax.typing import Array

__all__ = ["Inputs", "Kernel", "KernelSpec", "QueryTile", "TilePlace", "either", "rows_finite"]


@dataclasses.dataclass(frozen=True, eq=False)
class KernelSpec:
    """The static part of a call, known when its kernels are traced."""

    score_shape: tuple[int, int, int, int]  # (B, N, T, S)
    kv_heads: int
    grid: TileGrid
    tile: Tile
    mask: Split | None
    score_mod: Split | None
    dropout_rate: float
    learn_scale: bool
    interpret: bool

    @property
    def shared(self) -> int:
        """Query heads that share keys."""
        return self.score_shape[1] // self.kv_heads

    @property
    def is_plain(self) -> bool:
        """Whether the scores of full tiles are used as they are."""
        return self.score_mod is None


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


class TilePlace(NamedTuple):
    """The current tile of a program: tile i of queries and j of keys of a head; `turned` has keys as rows."""

    b: Any
    h: Any
    i: Any
    j: Any
    turned: bool = False

    def lay(self, x: Array, *, of_queries: bool) -> Array:
        """A vector over the tile's queries, or keys, along its axis of the tile."""
        return x[:, None] if of_queries != self.turned else x[None, :]


class QueryTile(NamedTuple):
    """The queries of a tile, as the backward pass reads them."""

    query: Array  # (T, H)
    d_out: Array  # (T, V)
    lse: Array  # (T,)
    delta: Array  # (T,)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A call, and the references that one of its kernels reads."""

    spec: KernelSpec
    inputs: Inputs

    def q_first(self, i: Any) -> Any:
        """The first query of a tile."""
        return _first(i, self.spec.grid.block_q, self.spec.grid.seq_q)

    def kv_first(self, j: Any) -> Any:
        """The first key of a tile."""
        return _first(j, self.spec.grid.block_kv, self.spec.grid.seq_kv)

    def own(self, n: Any, *, of_queries: bool) -> Array | None:
        """True for the queries, or keys, of a tile that no earlier tile holds; None for all."""
        grid = self.spec.grid
        if of_queries:
            first, block, is_alone = self.q_first(n), grid.block_q, grid.even_q or grid.num_q == 1
        else:
            first, block, is_alone = self.kv_first(n), grid.block_kv, grid.even_kv or grid.num_kv == 1
        return None if is_alone else first + jnp.arange(block, dtype=jnp.int32) >= n * block

    def write(self, ref: Any, where: tuple[Any, ...], x: Array, own: Array | None) -> None:
        """Writes only the program's own rows of `x`: another program might write other last bits."""
        if own is None or self.spec.interpret:
            ref[where] = x
            return
        from jax.experimental.pallas import triton  # as in `load`

        mask = own if own.ndim == x.ndim else own[:, None]
        triton.store(ref.at[where], x, mask=jnp.broadcast_to(mask, x.shape))

    def load(self, ref: Any, where: tuple[Any, ...], rows: Array | None) -> Array:
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
        columns = place.b, kv_head, pl.ds(self.kv_first(place.j), self.spec.grid.block_kv)
        where: tuple[Any, ...] = (*columns, slice(None))
        if inputs.block_table is not None:
            where = jnp.maximum(inputs.block_table[place.b, place.j], 0), kv_head, slice(None), slice(None)
        finite = None if full or inputs.finite is None else inputs.finite[columns] != 0
        key, value = (self.load(ref, where, finite) for ref in (inputs.key, inputs.value))
        if not full and finite is None:
            finite = rows_finite(key, value)
            key, value = (jnp.where(finite[:, None], x, 0) for x in (key, value))
        return key, value, finite

    def queries(self, place: TilePlace, *, full: bool = False) -> QueryTile:
        """The tile's queries for the backward pass; all rows of a full tile are finite."""
        inputs, rows = self.inputs, (place.b, place.h, pl.ds(self.q_first(place.i), self.spec.grid.block_q))
        lse = inputs.lse[rows]
        finite = None if full else ~jnp.isnan(lse)
        query, d_out = (self.load(ref, (*rows, slice(None)), finite) for ref in (inputs.query, inputs.d_out))
        return QueryTile(query, d_out, lse, inputs.delta[rows])

    def index(self, place: TilePlace) -> tuple[Any, Any, Array, Array]:
        """(b, h, q, kv) as masks and score mods see them."""
        grid = self.spec.grid
        q_first, kv_first, positions = self.q_first(place.i), self.kv_first(place.j), self.inputs.positions
        if positions is None:
            q = q_first + jnp.arange(grid.block_q, dtype=jnp.int32)
            kv = kv_first + jnp.arange(grid.block_kv, dtype=jnp.int32)
            q = q if grid.seq_q >= grid.block_q else jnp.minimum(q, grid.seq_q - 1)
            kv = kv if grid.seq_kv >= grid.block_kv else jnp.minimum(kv, grid.seq_kv - 1)
        else:
            q, kv = positions[0][pl.ds(q_first, grid.block_q)], positions[1][pl.ds(kv_first, grid.block_kv)]
        return place.b, place.h, place.lay(q, of_queries=True), place.lay(kv, of_queries=False)

    def cut(self, refs: tuple[Any, ...], variables: tuple[Any, ...], place: TilePlace) -> list[Array]:
        """The operands of a mask or score mod at a tile, in natural shapes."""
        cuts = []
        for ref, var in zip(refs, variables, strict=True):
            rows, heads, seq_q, seq_kv = ref.shape
            where = (place.b if rows > 1 else 0, place.h if heads > 1 else 0)
            if seq_q > 1:
                x = ref[(*where, pl.ds(self.q_first(place.i), self.spec.grid.block_q), 0)]
                x = place.lay(x, of_queries=True)
            elif seq_kv > 1:
                x = ref[(*where, 0, pl.ds(self.kv_first(place.j), self.spec.grid.block_kv))]
                x = place.lay(x, of_queries=False)
            else:
                x = ref[(*where, 0, 0)]
            cuts.append(x != 0 if var.aval.dtype == jnp.bool_ else x)
        return cuts

    def keep(self, place: TilePlace) -> Array | None:
        """Where the mask allows the pairs of a tile."""
        mask = self.spec.mask
        if mask is None:
            return None
        operands = self.cut(self.inputs.mask, mask.operands, place)
        return mask(operands, partial(_load, mask, self.inputs.mask_tables), *self.index(place))

    def drop(self, place: TilePlace) -> Callable[[Array], Array] | None:
        """The dropout of a tile's weights."""
        if self.inputs.dropout is None:
            return None
        words = tuple(self.inputs.dropout[n] for n in range(4))
        return dropout_of(words, self.spec.dropout_rate, *self.index(place))

    def bias(self, place: TilePlace, finite: Array | None, *, own_queries: bool, own_keys: bool) -> Array | None:
        """The bias for `softmax.mask_scores`: NaN for non-finite keys, -inf for pairs that belong to another tile."""
        grid = self.spec.grid
        bias = None if finite is None else jnp.where(place.lay(finite, of_queries=False), 0.0, jnp.nan)
        axes = []
        if own_keys and not grid.even_kv:
            axes.append((False, self.kv_first(place.j), place.j, grid.block_kv, grid.seq_kv))
        if own_queries and not grid.even_q:
            axes.append((True, self.q_first(place.i), place.i, grid.block_q, grid.seq_q))
        for of_queries, first, n, block, length in axes:
            index = first + jnp.arange(block, dtype=jnp.int32)
            outside = place.lay((index < n * block) | (index >= length), of_queries=of_queries)
            bias = jnp.where(outside, -jnp.inf, 0.0 if bias is None else bias)
        return bias

    def scores(
        self, left: Array, right: Array, place: TilePlace, bias: Array | None, *, full: bool, learn: str | None = None
    ) -> tuple[Array, Any]:
        """The tile's scores as `_core/softmax.py` takes them, and the pullback of the score mod if there is one.

        The pullback takes the gradient of the natural scores. It returns the gradient of the scores before the mod, and
        the gradients of the operands that `learn` names: "rows", "columns", "tables" or "" for none. With None there is
        no pullback.
        """
        score_mod = self.spec.score_mod
        scale = self.inputs.scale[0] * softmax.unit(has_score_mod=score_mod is not None)
        scores = softmax.product(left, right, 1, 1) * scale
        keep = None if full else self.keep(place)
        if score_mod is None:
            return (scores if full else softmax.mask_scores(scores, keep, bias)), None
        pulls = []

        def modify(scores: Array) -> Array:
            run, learned = self.mod(place, scores.shape, learn)
            result, pull = jax.vjp(run, scores, learned)
            pulls.append(pull)
            return result

        change = modify if learn is not None else lambda x: self.mod(place, x.shape)[0](x, ())
        masked = softmax.mask_scores(scores, keep, bias, change)

        def pull(d_scores: Array) -> tuple[Array, tuple[Array, ...]]:
            d_raw, d_learned = pulls[0](d_scores)
            # A mod's derivative may be NaN at forbidden pairs.
            return jnp.where(masked == -jnp.inf, 0, d_raw), d_learned

        return masked, pull

    def gradients(
        self,
        place: TilePlace,
        queries: QueryTile,
        key: Array,
        value: Array,
        learn: str,
        *,
        full: bool = False,
        own_queries: bool = False,
        own_keys: bool = False,
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """(weights, gradient of the raw scores, gradients of the operands that `learn` names) of a tile.

        A row that attends a non-finite key has NaN as its log-sum-exp, so keys are not tested again.
        """
        query, d_out, lse, delta = queries
        bias = None if full else self.bias(place, None, own_queries=own_queries, own_keys=own_keys)
        left, right, d_left, d_right = (key, query, value, d_out) if place.turned else (query, key, d_out, value)
        scores, pull = self.scores(left, right, place, bias, full=full, learn=learn)
        weights, d_scores = softmax.tile_gradients(
            scores,
            place.lay(lse, of_queries=True),
            place.lay(delta, of_queries=True),
            softmax.product(d_left, d_right, 1, 1),
            masked=not full or not self.spec.is_plain,
            dropout=self.drop(place),
        )
        return (weights, d_scores, ()) if pull is None else (weights, *pull(d_scores))

    def is_visited(self, place: TilePlace) -> Any:
        """1 for a full or partial tile, 0 for an empty tile."""
        codes = self.inputs.codes
        if codes is None:
            return 1
        rows, heads = codes.shape[:2]
        code = codes[place.b if rows > 1 else 0, place.h if heads > 1 else 0, place.i, place.j]
        return either(code == EMPTY, 0, 1)

    def index_of(self, read: Read, place: TilePlace, shape: tuple[int, ...]) -> list[Array]:
        """The indices of a read of the score mod, for each axis of the table; no index depends on scores."""
        found: list[list[Array]] = []
        score_mod = self.spec.score_mod
        assert score_mod is not None

        def load(other: Read, where: list[Array]) -> Array:
            if other is read:
                found.append(where)
            return _load(score_mod, self.inputs.mod_tables, other, where)

        operands = self.cut(self.inputs.mod, score_mod.operands, place)
        score_mod(operands, load, jnp.zeros(shape, jnp.float32), *self.index(place))
        return found[0]

    def no_full_tiles(self, b: Any, h: Any) -> Any:
        """Whether every tile of the head counts as partial; None if all tiles of all heads are partial."""
        any_non_finite = self.inputs.any_non_finite
        return None if any_non_finite is None else any_non_finite[b, h // self.spec.shared] != 0

    def mod(
        self, place: TilePlace, shape: tuple[int, ...], learn: str | None = None
    ) -> tuple[Callable[..., Array], Any]:
        """The score mod of a tile, as a function of the scores and the values that `learn` names; and these values."""
        score_mod, index = self.spec.score_mod, self.index(place)
        assert score_mod is not None
        operands = self.cut(self.inputs.mod, score_mod.operands, place)
        chosen = self.learned(learn)
        if learn == "tables":
            learned = tuple(jnp.zeros(shape, self.inputs.mod_tables[n].dtype) for n in chosen)
        else:
            rows = place.lay(jnp.zeros(self.spec.grid.block_q, jnp.bool_), of_queries=True).shape
            learned = tuple(jnp.broadcast_to(operands[n], rows) if learn == "rows" else operands[n] for n in chosen)

        def run(scores: Array, learned: tuple[Array, ...]) -> Array:
            changed = dict(zip(chosen, learned, strict=True))

            def load(read: Read, where: list[Array]) -> Array:
                value = _load(score_mod, self.inputs.mod_tables, read, where)
                n = score_mod.reads.index(read)
                return value + changed[n] if learn == "tables" and n in changed else value

            given = operands if learn == "tables" else [changed.get(n, x) for n, x in enumerate(operands)]
            return jnp.broadcast_to(score_mod(given, load, scores, *index), scores.shape)

        return run, learned

    def learned(self, learn: str | None) -> tuple[int, ...]:
        """The numbers of the floating operands, or reads, of the score mod that `learn` names."""
        refs = self.inputs.mod_tables if learn == "tables" else self.inputs.mod if learn else ()
        chosen = [n for n, ref in enumerate(refs) if jnp.issubdtype(ref.dtype, jnp.inexact)]
        return tuple(n for n in chosen if learn == "tables" or (refs[n].shape[3] > 1) == (learn == "columns"))


def _load(function: Split, tables: tuple[Any, ...], read: Read, where: list[Array]) -> Array:
    """The elements of a captured array that a mask or score mod reads."""
    n = function.reads.index(read)
    value = tables[n][tuple(jnp.broadcast_arrays(*where))]
    return value != 0 if read.dtype == jnp.bool_ else value


def either(condition: Any, x: Any, otherwise: Any) -> Any:
    """`jnp.where` of two integers. Lowered to Triton, a Python number would get the dtype of the condition."""
    return jnp.where(condition, jnp.int32(x), jnp.int32(otherwise))


def rows_finite(*arrays: Array) -> Array:
    """True for each row that is finite in all arrays."""
    non_finite = [jnp.where(jnp.isfinite(x.astype(jnp.float32)), 0, 1).max(1) for x in arrays]
    return functools.reduce(jnp.maximum, non_finite) == 0


def _first(n: Any, block: int, length: int) -> Any:
    """The start of tile n; the last tile starts early enough to end at `length`."""
    return n * block if length % block == 0 else jnp.maximum(0, jnp.minimum(n * block, length - block))
