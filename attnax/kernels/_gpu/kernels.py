"""Exact attention as Pallas kernels for NVIDIA GPUs; the mathematics of a tile comes from `_core/softmax.py`.

One program computes the results of one tile of queries (of keys, in the second backward kernel) and visits the tiles of
the other side that a list names: full ones, in which no mask is tested, then partial ones. Score mods and masks run
inside as `_pointwise.split` gives them. No program writes what another one computes: no result depends on chance.

    forward       out, lse          a program for each tile of queries, loops over keys
    d_query       dq, mod's rows    the same
    d_key_value   dk, dv, columns   a program for each tile of keys, loops over the heads that share them and queries
    d_tables      a mod's tables    a program for each tile of queries, or for each tile of pairs

A row or key that is not finite may harm only those who attend it. Where `careful` says that a batch row holds one, none
of its tiles counts as full: in partial ones such keys are not loaded, and a NaN stands for them.

This file, and `why_no_triton` in `_platform`, hold every line that knows the Triton backend of Pallas.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.tile_codes import EMPTY
from attnax.kernels._gpu.split import Read, Split
from attnax.kernels._gpu.tile_lists import TileGrid, TileList
from attnax.kernels._gpu.tile_sizes import Tile, fit_stages, running_card
from attnax.typing import Array

__all__ = [
    "Call",
    "Inputs",
    "Kernel",
    "Shapes",
    "d_key_value_kernel",
    "d_pairs_kernel",
    "d_query_kernel",
    "d_table_kernel",
    "forward_kernel",
    "run",
]

Visitor = Callable[[bool, Any, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What is known of a call when its kernels are written."""

    full: tuple[int, int, int, int]  # (B, N, T, S)
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
        return self.full[1] // self.kv_heads

    @property
    def is_plain(self) -> bool:
        """Whether the scores of full tiles are used as they are."""
        return self.score_mod is None


class Inputs(NamedTuple):
    """What the kernels read, arrays outside and references inside of them; lengths are at least a tile's."""

    query: Any  # (B, N, T, H)
    key: Any  # (B, K, S, H)
    value: Any  # (B, K, S, V)
    scale: Any  # (1,) float32
    tiles: TileList | None  # for each tile of queries; None where all are full
    turned: TileList | None  # for each tile of keys
    codes: Any  # (B', N', num_q, num_kv), or None
    careful: Any  # (B, K) int32: whether anything is not finite; None where nobody looked
    fine: Any  # (B, K, S) int32: which keys and values are finite; None likewise, and the kernel looks
    dropout: Any  # (4,) uint32, or None
    mask: tuple[Any, ...]  # operands of the mask, (B', N', T', S')
    mask_tables: tuple[Any, ...]  # the arrays that it loads from, one for each read
    mod: tuple[Any, ...]
    mod_tables: tuple[Any, ...]
    d_out: Any = None  # (B, N, T, V)
    lse: Any = None  # (B, N, T) in units of log 2; +inf where nothing is attended, NaN for a row that spoils
    delta: Any = None  # (B, N, T), see `softmax.tile_gradients`
    positions: Any = None  # (T,) and (S,) int32: what masks and score mods see of queries and keys; None for 0, 1, ...
    pages: Any = None  # (B, num_kv) int32: where tiles of keys lie, if key and value are pools (P, page, K, H)


class Place(NamedTuple):
    """The tile that a program is at: tile i of queries and j of keys of a head; `turned` has keys as rows."""

    b: Any
    h: Any
    i: Any
    j: Any
    turned: bool = False

    def lay(self, x: Array, *, of_queries: bool) -> Array:
        """A vector over the tile's queries, or keys, along its axis of the tile."""
        return x[:, None] if of_queries != self.turned else x[None, :]


class Queries(NamedTuple):
    """What the backward pass knows of a tile's queries."""

    query: Array  # (T, H)
    d_out: Array  # (T, V)
    lse: Array  # (T,)
    delta: Array  # (T,)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A call and the references that one of its kernels reads."""

    call: Call
    inputs: Inputs

    def q_first(self, i: Any) -> Any:
        """The first query of a tile."""
        grid = self.call.grid
        return (
            i * grid.block_q
            if grid.even_q
            else jnp.maximum(0, jnp.minimum(i * grid.block_q, grid.seq_q - grid.block_q))
        )

    def kv_first(self, j: Any) -> Any:
        """The first key of a tile."""
        grid = self.call.grid
        return (
            j * grid.block_kv
            if grid.even_kv
            else jnp.maximum(0, jnp.minimum(j * grid.block_kv, grid.seq_kv - grid.block_kv))
        )

    def own(self, n: Any, *, of_queries: bool) -> Array | None:
        """Which queries, or keys, of a tile no tile before it holds; None for all."""
        grid = self.call.grid
        if of_queries:
            first, block, is_alone = self.q_first(n), grid.block_q, grid.even_q or grid.num_q == 1
        else:
            first, block, is_alone = self.kv_first(n), grid.block_kv, grid.even_kv or grid.num_kv == 1
        return None if is_alone else first + jnp.arange(block, dtype=jnp.int32) >= n * block

    def write(self, ref: Any, where: tuple[Any, ...], x: Array, own: Array | None) -> None:
        """Writes the rows of `x` that are this program's own, so that no other one writes other last bits of them."""
        if own is None or self.call.interpret:
            ref[where] = x
            return
        from jax.experimental.pallas import triton  # as in `_compiler_params`

        mask = own if own.ndim == x.ndim else own[:, None]
        triton.store(ref.at[where], x, mask=jnp.broadcast_to(mask, x.shape))

    def load(self, ref: Any, where: tuple[Any, ...], rows: Array | None) -> Array:
        """A matrix of an array, zeros in place of those of its rows that are not to be loaded."""
        if rows is None:
            return ref[where]
        if self.call.interpret:
            return jnp.where(rows[:, None], ref[where], 0)
        from jax.experimental.pallas import triton  # not every JAX has it, and interpreted kernels do without

        return triton.load(ref.at[where], mask=jnp.broadcast_to(rows[:, None], (rows.size, ref.shape[-1])), other=0)

    def keys(self, place: Place, *, full: bool = False) -> tuple[Array, Array, Array | None]:
        """The tile's keys and values, and which of them are finite: zeros stand for others. Of a full one all are."""
        kv_head, inputs = place.h // self.call.shared, self.inputs
        columns = place.b, kv_head, pl.ds(self.kv_first(place.j), self.call.grid.block_kv)
        where: tuple[Any, ...] = (*columns, slice(None))
        if inputs.pages is not None:
            where = jnp.maximum(inputs.pages[place.b, place.j], 0), slice(None), kv_head, slice(None)
        fine = None if full or inputs.fine is None else inputs.fine[columns] != 0
        key, value = (self.load(ref, where, fine) for ref in (inputs.key, inputs.value))
        if not full and fine is None:
            fine = _is_fine(key, value)
            key, value = (jnp.where(fine[:, None], x, 0) for x in (key, value))
        return key, value, fine

    def queries(self, place: Place, *, full: bool = False) -> Queries:
        """What the backward pass reads of the tile's queries; who attends a full one is finite."""
        inputs, rows = self.inputs, (place.b, place.h, pl.ds(self.q_first(place.i), self.call.grid.block_q))
        lse = inputs.lse[rows]
        fine = None if full else ~jnp.isnan(lse)
        query, d_out = (self.load(ref, (*rows, slice(None)), fine) for ref in (inputs.query, inputs.d_out))
        return Queries(query, d_out, lse, inputs.delta[rows])

    def index(self, place: Place) -> tuple[Any, Any, Array, Array]:
        """(b, h, q, kv) as masks and score mods see them."""
        grid = self.call.grid
        q_first, kv_first, positions = self.q_first(place.i), self.kv_first(place.j), self.inputs.positions
        if positions is None:
            q = q_first + jnp.arange(grid.block_q, dtype=jnp.int32)
            kv = kv_first + jnp.arange(grid.block_kv, dtype=jnp.int32)
            q = q if grid.seq_q >= grid.block_q else jnp.minimum(q, grid.seq_q - 1)
            kv = kv if grid.seq_kv >= grid.block_kv else jnp.minimum(kv, grid.seq_kv - 1)
        else:
            q, kv = positions[0][pl.ds(q_first, grid.block_q)], positions[1][pl.ds(kv_first, grid.block_kv)]
        return place.b, place.h, place.lay(q, of_queries=True), place.lay(kv, of_queries=False)

    def cut(self, refs: tuple[Any, ...], variables: tuple[Any, ...], place: Place) -> list[Array]:
        """The operands of a mask or score mod at a tile, in natural shapes."""
        cuts = []
        for ref, var in zip(refs, variables, strict=True):
            rows, heads, seq_q, seq_kv = ref.shape
            where = (place.b if rows > 1 else 0, place.h if heads > 1 else 0)
            if seq_q > 1:
                x = ref[(*where, pl.ds(self.q_first(place.i), self.call.grid.block_q), 0)]
                x = place.lay(x, of_queries=True)
            elif seq_kv > 1:
                x = ref[(*where, 0, pl.ds(self.kv_first(place.j), self.call.grid.block_kv))]
                x = place.lay(x, of_queries=False)
            else:
                x = ref[(*where, 0, 0)]
            cuts.append(x != 0 if var.aval.dtype == jnp.bool_ else x)
        return cuts

    def keep(self, place: Place) -> Array | None:
        """Where the mask allows the pairs of a tile."""
        mask = self.call.mask
        if mask is None:
            return None
        operands = self.cut(self.inputs.mask, mask.operands, place)
        return mask(operands, partial(_load, mask, self.inputs.mask_tables), *self.index(place))

    def drop(self, place: Place) -> Callable[[Array], Array] | None:
        """The dropout of a tile's weights."""
        if self.inputs.dropout is None:
            return None
        words = tuple(self.inputs.dropout[n] for n in range(4))
        return dropout_of(words, self.call.dropout_rate, *self.index(place))

    def bias(self, place: Place, fine: Array | None, *, own_queries: bool, own_keys: bool) -> Array | None:
        """What `softmax.mask_scores` adds: -inf for pairs of which another tile takes care, NaN for keys that spoil."""
        grid, bias = self.call.grid, None
        if fine is not None:
            bias = jnp.where(place.lay(fine, of_queries=False), 0.0, jnp.nan)
        if own_keys and not grid.even_kv:
            kv = self.kv_first(place.j) + jnp.arange(grid.block_kv, dtype=jnp.int32)
            outside = place.lay((kv < place.j * grid.block_kv) | (kv >= grid.seq_kv), of_queries=False)
            bias = jnp.where(outside, -jnp.inf, 0.0 if bias is None else bias)
        if own_queries and not grid.even_q:
            q = self.q_first(place.i) + jnp.arange(grid.block_q, dtype=jnp.int32)
            outside = place.lay((q < place.i * grid.block_q) | (q >= grid.seq_q), of_queries=True)
            bias = jnp.where(outside, -jnp.inf, 0.0 if bias is None else bias)
        return bias

    def scores(
        self, left: Array, right: Array, place: Place, bias: Array | None, *, full: bool, learn: str | None = None
    ) -> tuple[Array, Any]:
        """The tile's scores as `_core/softmax.py` takes them, and the pullback of the score mod if there is one.

        The pullback takes the gradient of the natural scores and gives that of the scores before the mod, and those of
        what `learn` names: "rows", "columns", "tables" or "" for nothing; with None nothing is differentiated.
        """
        score_mod = self.call.score_mod
        scores = softmax.product(left, right, 1, 1) * (
            self.inputs.scale[0] * softmax.unit(has_score_mod=score_mod is not None)
        )
        keep = None if full else self.keep(place)
        if score_mod is None:
            return (scores if full else softmax.mask_scores(scores, keep, bias)), None
        pulls = []

        def modify(scores: Array) -> Array:
            run, learned = self.mod(place, scores.shape, learn)
            result, pull = jax.vjp(run, scores, learned)
            pulls.append(pull)
            return result

        masked = softmax.mask_scores(
            scores, keep, bias, modify if learn is not None else lambda x: self.mod(place, x.shape)[0](x, ())
        )

        def pull(d_scores: Array) -> tuple[Array, tuple[Array, ...]]:
            d_raw, d_learned = pulls[0](d_scores)
            # A mod's derivative may be NaN at the scores that stand for forbidden pairs.
            return jnp.where(masked == -jnp.inf, 0, d_raw), d_learned

        return masked, pull

    def gradients(
        self,
        place: Place,
        queries: Queries,
        key: Array,
        value: Array,
        learn: str,
        *,
        full: bool = False,
        own_queries: bool = False,
        own_keys: bool = False,
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """(weights, gradient of the raw scores, gradients of what `learn` names) of a tile.

        Who attends a key that spoils has a log-sum-exp of NaN: no need to look at that key again.
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
            masked=not full or not self.call.is_plain,
            dropout=self.drop(place),
        )
        return (weights, d_scores, ()) if pull is None else (weights, *pull(d_scores))

    def visit_keys(self, visit: Visitor, place: Place, state: Any, part: tuple[Any, int] = (0, 1)) -> Any:
        """`visit(full, j, state)` for the tiles of keys that the tile of queries attends, or a part of them."""
        grid = self.call.grid
        where: Any = (place.b, place.h, place.i)
        full: Any = grid.num_kv - (not grid.even_kv)
        if not grid.even_q:  # as in a list: a tile that is not whole is never full
            full = _either(place.i == grid.num_q - 1, 0, full)
        return _visit(visit, self.inputs.tiles, where, grid.num_kv, full, self.careful(place.b, place.h), state, part)

    def visit_queries(self, visit: Visitor, place: Place, state: Any) -> Any:
        """`visit(full, i, state)` for the tiles of queries that attend the tile of keys."""
        grid = self.call.grid
        where, full = (place.b, place.h, place.j), grid.num_q - (not grid.even_q)
        return _visit(visit, self.inputs.turned, where, grid.num_q, full, self.careful(place.b, place.h), state)

    def is_visited(self, place: Place) -> Any:
        """1 for a tile that is not empty, 0 for one that is."""
        codes = self.inputs.codes
        if codes is None:
            return 1
        rows, heads = codes.shape[:2]
        code = codes[place.b if rows > 1 else 0, place.h if heads > 1 else 0, place.i, place.j]
        return _either(code == EMPTY, 0, 1)

    def index_of(self, read: Read, place: Place, shape: tuple[int, ...]) -> list[Array]:
        """Where the score mod reads, for each axis of the table; the indices do not depend on scores."""
        found: list[list[Array]] = []
        score_mod = self.call.score_mod
        assert score_mod is not None

        def load(other: Read, where: list[Array]) -> Array:
            if other is read:
                found.append(where)
            return _load(score_mod, self.inputs.mod_tables, other, where)

        score_mod(
            self.cut(self.inputs.mod, score_mod.operands, place),
            load,
            jnp.zeros(shape, jnp.float32),
            *self.index(place),
        )
        return found[0]

    def careful(self, b: Any, h: Any) -> Any:
        """Whether no tile of this head counts as full; None for always."""
        careful = self.inputs.careful
        return None if careful is None else careful[b, h // self.call.shared] != 0

    def mod(self, place: Place, shape: tuple[int, ...], learn: str | None = None) -> tuple[Callable[..., Array], Any]:
        """The score mod of a tile as a function of scores and of the values that `learn` names, and those values."""
        score_mod, index = self.call.score_mod, self.index(place)
        assert score_mod is not None
        operands = self.cut(self.inputs.mod, score_mod.operands, place)
        chosen = self.learned(learn)
        if learn == "tables":
            learned = tuple(jnp.zeros(shape, self.inputs.mod_tables[n].dtype) for n in chosen)
        else:
            rows = place.lay(jnp.zeros(self.call.grid.block_q, jnp.bool_), of_queries=True).shape
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
        """Which operands, or reads, of the score mod `learn` names: floating ones of queries, keys or pairs."""
        refs = self.inputs.mod_tables if learn == "tables" else self.inputs.mod if learn else ()
        chosen = [n for n, ref in enumerate(refs) if jnp.issubdtype(ref.dtype, jnp.inexact)]
        return tuple(n for n in chosen if learn == "tables" or (refs[n].shape[3] > 1) == (learn == "columns"))


def _load(function: Split, tables: tuple[Any, ...], read: Read, where: list[Array]) -> Array:
    """What a mask or score mod reads of a captured array."""
    n = function.reads.index(read)
    value = tables[n][tuple(jnp.broadcast_arrays(*where))]
    return value != 0 if read.dtype == jnp.bool_ else value


def _visit(
    visit: Visitor,
    tiles: TileList | None,
    where: tuple[Any, Any, Any],
    count: int,
    num_full: Any,
    careful: Any,
    state: Any,
    part: tuple[Any, int] = (0, 1),
) -> Any:
    """`visit(full, tile, state)` for the tiles that a list names, or for all of `count`.

    Args:
        visit: what is done.
        tiles: the list, of which `where` = (b, h, row) is read.
        where: the place of this program.
        count: tiles if there is no list.
        num_full: of them.
        careful: whether none counts as full; None for yes.
        state: what is carried.
        part: (n, of): only the n-th of so many equal parts.
    """
    num_visited: Any = count
    at: tuple[Any, ...] = ()
    if tiles is not None:
        b, h, row = where
        rows, heads = tiles.order.shape[:2]
        at = (b if rows > 1 else 0, h if heads > 1 else 0, row)
        num_full, num_visited = tiles.num_full[at], tiles.num_visited[at]

    def tile(n: Any) -> Any:
        return n if tiles is None else tiles.order[(*at, n)]

    n, parts = part
    share = (num_visited + parts - 1) // parts
    first, last = jnp.minimum(n * share, num_visited), jnp.minimum((n + 1) * share, num_visited)
    middle = first if careful is None else _either(careful, first, jnp.clip(num_full, first, last))

    def loop(first: Any, last: Any, state: Any, *, full: bool) -> Any:
        return lax.fori_loop(first, last, lambda n, state: visit(full, tile(n), state), state)

    if careful is not None:
        state = loop(first, middle, state, full=True)
    return loop(middle, last, state, full=False)


def _either(condition: Any, x: Any, otherwise: Any) -> Any:
    """One of two whole numbers. Lowered to Triton, a Python number would have the dtype of the condition."""
    return jnp.where(condition, jnp.int32(x), jnp.int32(otherwise))


def _is_fine(*arrays: Array) -> Array:
    """Which rows are finite in all arrays."""
    bad = [jnp.where(jnp.isfinite(x.astype(jnp.float32)), 0, 1).max(1) for x in arrays]
    return functools.reduce(jnp.maximum, bad) == 0


def forward_kernel(call: Call, parts: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The attention of a tile of queries, or its state over one of several parts of the keys."""
    kernel, grid = Kernel(call, inputs), call.grid
    step, h, b = (pl.program_id(axis) for axis in range(3))
    i = grid.num_q - 1 - step // parts  # under a causal mask the last tiles have most to do, so they begin
    start = Place(b, h, i, 0)
    rows = b, h, pl.ds(kernel.q_first(i), grid.block_q)
    query = inputs.query[(*rows, slice(None))]
    fine = _is_fine(query)
    query = jnp.where(fine[:, None], query, 0)

    def visit(full: bool, j: Any, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
        place = start._replace(j=j)
        key, value, fine = kernel.keys(place, full=full)
        bias = None if full else kernel.bias(place, fine, own_queries=False, own_keys=True)
        scores, _ = kernel.scores(query, key, place, bias, full=full)
        masked = not full or not call.is_plain
        return softmax.update(state, scores, value, masked=masked, dropout=kernel.drop(place))

    state = softmax.initial_state((grid.block_q,), inputs.value.shape[-1], jnp.dtype(jnp.float32))
    state = kernel.visit_keys(visit, start, state, (step % parts, parts))
    own = kernel.own(i, of_queries=True)
    if "acc" in outputs:
        spoilt_rows = jnp.where(fine, 0.0, jnp.nan)
        at = (b, h, step % parts, rows[2])
        kernel.write(outputs["acc"], (*at, slice(None)), state.acc, own)
        kernel.write(outputs["max"], at, state.max, own)
        kernel.write(outputs["sum"], at, state.sum + jnp.where(state.sum == 0, 0.0, spoilt_rows), own)
        return
    out, lse = softmax.finish(state)
    spoilt_rows = jnp.where(fine | (state.sum == 0), 0.0, jnp.nan)
    out, lse = out + spoilt_rows[:, None], lse + spoilt_rows
    kernel.write(outputs["lse"], rows, lse, own)
    high = out.astype(outputs["out"].dtype)
    kernel.write(outputs["out"], (*rows, slice(None)), high, own)
    if "low" in outputs:
        low = (out - high.astype(jnp.float32)).astype(high.dtype)
        kernel.write(outputs["low"], (*rows, slice(None)), low, own)


def d_query_kernel(call: Call, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradients of a tile of queries, and of the score mod's operands for them."""
    kernel, grid = Kernel(call, inputs), call.grid
    step, h, b = (pl.program_id(axis) for axis in range(3))
    start = Place(b, h, grid.num_q - 1 - step, 0)
    queries, learn = kernel.queries(start), kernel.learned("rows")

    def visit(full: bool, j: Any, state: Any) -> Any:
        place = start._replace(j=j)
        d_query, learned = state
        key, value, _ = kernel.keys(place, full=full)
        _, d_raw, d_learned = kernel.gradients(place, queries, key, value, "rows", full=full, own_keys=True)
        d_query = d_query + softmax.product(d_raw, key, 1, 0)
        return d_query, tuple(x + y.astype(x.dtype) for x, y in zip(learned, d_learned, strict=True))

    d_query = jnp.zeros((grid.block_q, inputs.query.shape[-1]), jnp.float32)
    state = d_query, tuple(jnp.zeros((grid.block_q, 1), jnp.float32) for _ in learn)
    d_query, learned = kernel.visit_keys(visit, start, state)
    rows, own = (b, h, pl.ds(kernel.q_first(start.i), grid.block_q)), kernel.own(start.i, of_queries=True)
    d_query = d_query if call.learn_scale else d_query * inputs.scale[0]
    kernel.write(outputs["d_query"], (*rows, slice(None)), d_query.astype(outputs["d_query"].dtype), own)
    for n, x in zip(learn, learned, strict=True):
        kernel.write(outputs[f"mod {n}"], rows, x.reshape(grid.block_q), own)


def d_key_value_kernel(call: Call, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradients of a tile of keys and values, and of the score mod's operands for them."""
    kernel, grid = Kernel(call, inputs), call.grid
    j, kv_head, b = (pl.program_id(axis) for axis in range(3))
    key, value, _ = kernel.keys(Place(b, kv_head * call.shared, 0, j))
    learn = kernel.learned("columns")
    columns, own = pl.ds(kernel.kv_first(j), grid.block_kv), kernel.own(j, of_queries=False)

    def head(n: Any, sums: Any) -> Any:
        h = kv_head * call.shared + n

        def visit(full: bool, i: Any, state: Any) -> Any:
            place = Place(b, h, i, j, turned=True)
            (d_key, d_value), learned = state
            queries = kernel.queries(place, full=full)
            weights, d_raw, d_learned = kernel.gradients(
                place, queries, key, value, "columns", full=full, own_queries=True
            )
            d_value = d_value + softmax.product(weights, queries.d_out, 1, 0)
            d_key = d_key + softmax.product(d_raw, queries.query, 1, 0)
            return (d_key, d_value), tuple(x + y.astype(x.dtype) for x, y in zip(learned, d_learned, strict=True))

        state = sums, tuple(jnp.zeros((grid.block_kv, 1), jnp.float32) for _ in learn)
        sums, learned = kernel.visit_queries(visit, Place(b, h, 0, j), state)
        for operand, x in zip(learn, learned, strict=True):
            kernel.write(outputs[f"mod {operand}"], (b, h, columns), x.reshape(grid.block_kv), own)
        return sums

    sums = tuple(jnp.zeros((grid.block_kv, x.shape[-1]), jnp.float32) for x in (key, value))
    d_key, d_value = lax.fori_loop(0, call.shared, head, sums)
    where = b, kv_head, columns, slice(None)
    kernel.write(outputs["d_key"], where, (d_key * inputs.scale[0]).astype(outputs["d_key"].dtype), own)
    kernel.write(outputs["d_value"], where, d_value.astype(outputs["d_value"].dtype), own)


def d_table_kernel(call: Call, n: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradient of what one read takes from a table, summed over some tiles of queries and all their keys.

    A program holds a chunk of the table. For each tile it sums, one after the other, the elements from the first to the
    last that the tile reads: these are few in a table by distance.
    """
    kernel, score_mod, num_q = Kernel(call, inputs), call.score_mod, call.grid.num_q
    assert score_mod is not None
    group, h, b = (pl.program_id(axis) for axis in range(3))
    _, _, chunks, groups, size = outputs["table"].shape
    group, chunk = group // chunks, group % chunks
    read, begin = score_mod.reads[n], chunk * size
    elements = begin + jnp.arange(size, dtype=jnp.int32)

    def row(i: Any, total: Array) -> Array:
        start = Place(b, h, i, 0)
        queries = kernel.queries(start)

        def visit(full: bool, j: Any, total: Array) -> Array:
            place = start._replace(j=j)
            where = kernel.index_of(read, place, (call.grid.block_q, call.grid.block_kv))
            element = jnp.int32(0)
            for axis in read.axes:
                element = element * read.shape[axis] + where[axis]
            first, last = jnp.maximum(element.min(), begin), jnp.minimum(element.max() + 1, begin + size)

            def tile(_: Any, total: Array) -> Array:
                key, value, _ = kernel.keys(place, full=full)
                *_, d_learned = kernel.gradients(
                    place, queries, key, value, "tables", full=full, own_queries=True, own_keys=True
                )
                share = d_learned[kernel.learned("tables").index(n)].astype(jnp.float32)

                def add(e: Any, total: Array) -> Array:
                    return jnp.where(elements == e, total + jnp.where(element == e, share, 0.0).sum(), total)

                return lax.fori_loop(first, last, add, total)

            return lax.fori_loop(jnp.int32(0), (first < last).astype(jnp.int32), tile, total)

        return kernel.visit_keys(visit, start, total)

    count = -(-num_q // groups)
    rows = group * count, jnp.minimum((group + 1) * count, num_q)
    outputs["table"][b, h, chunk, group, :] = lax.fori_loop(*rows, row, jnp.zeros(size, jnp.float32))


def d_pairs_kernel(call: Call, n: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradient of what one read takes from a table with an element for each pair, summed over rows and heads."""
    kernel, grid = Kernel(call, inputs), call.grid
    step, head, row = (pl.program_id(axis) for axis in range(3))
    rows, heads = outputs["table"].shape[:2]
    i, j = step // grid.num_kv, step % grid.num_kv
    num_rows, num_heads = call.full[0] // rows, call.full[1] // heads

    def add(b: Any, h: Any, total: Array) -> Array:
        place = Place(row + b, head + h, i, j)

        def visit(_: Any, total: Array) -> Array:
            key, value, _ = kernel.keys(place)
            *_, d_learned = kernel.gradients(place, kernel.queries(place), key, value, "tables")
            return total + d_learned[kernel.learned("tables").index(n)].astype(jnp.float32)

        return lax.fori_loop(0, kernel.is_visited(place), visit, total)

    def add_row(b: Any, total: Array) -> Array:
        return lax.fori_loop(0, num_heads, partial(add, b), total)

    total = jnp.zeros((grid.block_q, grid.block_kv), jnp.float32)
    total = lax.fori_loop(0, num_rows, add_row, total)
    where = row, head, pl.ds(kernel.q_first(i), grid.block_q), pl.ds(kernel.kv_first(j), grid.block_kv)
    rows_own, columns_own = kernel.own(i, of_queries=True), kernel.own(j, of_queries=False)
    own = None if rows_own is None else rows_own[:, None]
    if columns_own is not None:
        own = columns_own[None, :] if own is None else own & columns_own[None, :]
    kernel.write(outputs["table"], where, total, own)


Shapes = dict[str, tuple[tuple[int, ...], Any]]


def run(
    name: str, kernel: Callable[..., None], call: Call, grid: tuple[int, ...], inputs: Inputs, shapes: Shapes
) -> dict[str, Array]:
    """What a kernel writes: `kernel(inputs, outputs)` for each program of a grid."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(inputs)))
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    aval = jax.typeof(inputs.query)
    varying = {} if not axes else {"manual_axis_type": aval.mat} if hasattr(aval, "mat") else {"vma": axes}
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape={key: jax.ShapeDtypeStruct(shape, dtype, **varying) for key, (shape, dtype) in shapes.items()},
        compiler_params=None if call.interpret else _compiler_params(name, call, inputs),
        interpret=call.interpret,
        name=name,
    )(inputs)


def _compiler_params(name: str, call: Call, inputs: Inputs) -> Any:
    from jax.experimental.pallas import triton  # not every JAX has it, and interpreted kernels do without

    kind = {"attnax_forward": "forward", "attnax_decode": "decode"}.get(name, "backward")
    sizes = inputs.query.shape[-1], inputs.value.shape[-1], 8 * inputs.query.dtype.itemsize
    pair_bytes = sum(function.pair_bytes for function in (call.mask, call.score_mod) if function is not None)
    tile = fit_stages(kind, call.tile, *sizes, running_card(), pair_bytes=pair_bytes)
    return triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
