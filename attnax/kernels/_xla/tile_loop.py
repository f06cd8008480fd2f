"""The tile loop: selects, orders and computes tiles of queries and keys, forward and backward.

Memory is that of the arguments and the result, never T * S. For each tile of queries the bounds of the mask sort the
tiles of keys into full, partial and empty ones; those of a user's function come from `_core/intervals.py`. If bounds
cannot tell, the pairs of the tile decide. Empty tiles are skipped; full tiles need no mask test. The backward pass
loops over tiles of keys in the same way and recomputes the weights. `_core/softmax.py` has the mathematics of a tile;
`_core/operands.py` prepares the functions of a user.

`tiles.py` chooses their sizes. The file is as long as it is because both passes share one way to cut, order and visit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.finite import zero_or_nan
from attnax.kernels._core.intervals import bounds_of
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, vary_all, varying_axes
from attnax.kernels._core.no_reverse import without_reverse
from attnax.kernels._core.operands import Operands
from attnax.kernels._core.tile_codes import EMPTY, FULL, PARTIAL, code_of
from attnax.kernels._xla.exponential import exp2
from attnax.kernels._xla.tiles import Shape, Tiles, tile_shape
from attnax.typing import Array

__all__ = [
    "backward",
    "forward",
    "prepare_rows",
]


class BackwardRows(NamedTuple):
    """The queries of the backward pass, with their results."""

    query: Array  # (B, N, T, H), scaled
    d_out: Array  # (B, N, T, V)
    lse: Array  # (B, N, T) over all keys, in units of log 2; +inf if the row attends nothing, NaN if it is contaminated
    delta: Array  # (B, N, T), see `softmax.tile_gradients`
    finite: Array  # (B, N, T): tiles have 0 in place of a non-finite row, since 0 * NaN behind a mask is NaN


class HeadBlock(NamedTuple):
    """Consecutive rows of the batch and heads of an array (B, N, ...)."""

    row: Any
    head: Any
    num_rows: int
    num_heads: int

    def start(self, *rest: Any) -> tuple[Array, ...]:
        """The first index of a slice; loops may count in 64 bits, and a slice takes indices of one dtype."""
        return tuple(jnp.asarray(index).astype(jnp.int32) for index in (self.row, self.head, *rest))


class Keys(NamedTuple):
    """Keys and values, padded to whole tiles. In a tile a non-finite key is 0, and its `bias` contaminates."""

    key: Array  # (B, K, S', H)
    value: Array  # (B, K, S', V)
    bias: Array  # (B, K, S'): 0, NaN for a non-finite key or value, -inf for an out-of-range one


class Order(NamedTuple):
    """The order of the tiles along one axis: full tiles first, then partial ones; the remaining tiles are empty."""

    nth: Callable[[Any], Any]
    num_full: Any  # an int if known
    num_visited: Any


@dataclasses.dataclass(frozen=True)
class Walk:
    """One pass over the tiles: their places, their masks, and their order."""

    tiles: Tiles
    operands: Operands  # with indices padded to whole tiles, (T',) and (S',)
    shape: Shape
    dropout_rate: float

    @property
    def num_groups(self) -> int:
        """Groups of query heads that share keys, in all rows of the batch."""
        return self.shape[0] * self.shape[3]

    @property
    def num_queries(self) -> int:
        """Tiles along the queries."""
        return self.operands.q_index.shape[0] // self.tiles.queries

    @property
    def num_keys(self) -> int:
        """Tiles along the keys."""
        return self.operands.kv_index.shape[0] // self.tiles.keys

    @property
    def is_padded(self) -> bool:
        """Whether the last tile of keys has padding."""
        return self.operands.kv_index.shape[0] > self.shape[4]

    @property
    def is_full(self) -> bool:
        """Whether all tiles are full."""
        return self.operands.mask is None and not self.is_padded

    @property
    def is_plain(self) -> bool:
        """Whether there is no score mod: the scores of full tiles are used as they are."""
        return self.operands.score_mod is None

    def indices(self, x: Any, i: Any, j: Any) -> tuple[Array, Array, Array, Array]:
        """(b, h, q, kv) of tile (i, j) from group x on, shapes (Bt,1,1,1), (1,Nt,1,1), (1,1,Tt,1), (1,1,1,St)."""
        rows, heads = self._rows_and_heads(x)
        q, kv = self.operands.q_index, self.operands.kv_index
        if self.num_queries > 1:
            q = _cut_index(q, i, self.tiles.queries)
        if self.num_keys > 1:
            kv = _cut_index(kv, j, self.tiles.keys)
        return rows, heads, q[None, None, :, None], kv[None, None, None, :]

    def keep(self, x: Any, i: Any, j: Any) -> Array | None:
        """Where the mask allows the pairs of a tile, at its natural shape (Bt|1, N|1, Tt|1, St|1)."""
        if self.operands.mask is None:
            return None
        return _four_axes(self.operands.mask(*self.indices(x, i, j)))

    def drop(self, x: Any, i: Any, j: Any) -> Callable[[Array], Array] | None:
        """The dropout of a tile's weights."""
        words = self.operands.dropout
        return None if words is None else dropout_of(words, self.dropout_rate, *self.indices(x, i, j))

    def mask_scores(
        self, scores: Array, key_bias: Array, keep: Array | None, x: Any, i: Any, j: Any
    ) -> tuple[Array, Callable[..., Any] | None]:
        """The tile's scores (X, M, St) after score mod, mask and `key_bias` (X, St), and the score mod's pullback."""
        shape, score_mod = tile_shape(self.tiles, self.shape), self.operands.score_mod
        shared = self.shape[1] // self.shape[3]
        key_bias = jnp.broadcast_to(key_bias[:, None], (key_bias.shape[0], shared, shape[3]))
        key_bias = key_bias.reshape(*shape[:2], 1, shape[3])
        if score_mod is None:
            return softmax.mask_scores(scores.reshape(shape), keep, key_bias).reshape(scores.shape), None
        pullbacks = []

        def modify(scores: Array) -> Array:
            result, pullback = score_mod.differentiate(scores, *self.indices(x, i, j))
            pullbacks.append(pullback)
            return result

        masked = softmax.mask_scores(scores.reshape(shape), keep, key_bias, modify)

        def pull(d_scores: Array, gradients: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            d_raw, gradients = pullbacks[0](d_scores.reshape(shape), gradients)
            return softmax.select(masked != -jnp.inf, d_raw, 0).reshape(scores.shape), gradients

        return masked.reshape(scores.shape), pull

    def keys_for(self, x: Any, i: Any) -> Order:
        """The order of the tiles of keys for tile i of queries."""
        if self.num_keys == 1 or self.is_full:
            return self._all(self.num_keys)
        q, kv = _ranges(self.operands.q_index, self.tiles.queries), _ranges(self.operands.kv_index, self.tiles.keys)
        ranges = *(_at(end, i).reshape(1, 1, 1, 1) for end in q), *(end[None, None, None] for end in kv)
        last = self.is_padded and jnp.arange(self.num_keys) == self.num_keys - 1
        return self._order(x, ranges, self.num_keys, last, lambda j: self.keep(x, i, j))

    def queries_for(self, x: Any, j: Any) -> Order:
        """The order of the tiles of queries for tile j of keys."""
        if self.num_queries == 1 or self.is_full:
            return self._all(self.num_queries)
        q, kv = _ranges(self.operands.q_index, self.tiles.queries), _ranges(self.operands.kv_index, self.tiles.keys)
        ranges = *(end[None, None, :, None] for end in q), *(_at(end, j).reshape(1, 1, 1, 1) for end in kv)
        last = j == self.num_keys - 1
        return self._order(x, ranges, self.num_queries, last, lambda i: self.keep(x, i, j))

    def _all(self, count: int) -> Order:
        """Every tile, in its own order."""
        return Order(lambda n: n, count if self.is_full else 0, count)

    def _order(
        self, x: Any, ranges: tuple[Array, ...], count: int, last: Any, keep: Callable[[Array], Array | None]
    ) -> Order:
        """The order by the bounds of `count` tiles; `last` is True for tiles that hold the last keys."""
        some, every = jnp.ones(count, bool), jnp.full(count, self.operands.mask is None)
        for nth, of_heads in enumerate(self._bounds(*self._rows_and_heads(x), *ranges)):
            may, must = (
                jnp.broadcast_to(reduce(_four_axes(x), (0, 1)).reshape(-1), (count,))
                for x, reduce in zip(of_heads, (jnp.any, jnp.all), strict=True)
            )
            # The first bounds take the place of "cannot tell", which saves equations.
            some, every = (may, must) if nth == 0 else (some & may, every | must)
        axes = varying_axes(self.operands.q_index)
        codes, tiles = (vary(x, axes) for x in (code_of(some, every), jnp.arange(count, dtype=jnp.int32)))
        if self.operands.is_opaque:

            def exact(tile: Array) -> Array:
                kept = keep(tile)
                assert kept is not None
                kept = kept.astype(jnp.int8)  # `any` and `all` of booleans take a CPU 6 times as long
                return code_of(kept.max(-2).max() > 0, kept.min(-2).min() > 0)

            def refined(tile: tuple[Array, Array]) -> Array:
                index, code = tile
                return lax.cond(code == PARTIAL, exact, lambda _: code, index)

            codes = lax.map(refined, (tiles, codes))
        if self.is_padded:
            codes = jnp.where(last, jnp.maximum(codes, PARTIAL), codes)
        _, order = lax.sort((codes, tiles), num_keys=1, is_stable=True)
        return Order(partial(_at, order), (codes == FULL).sum(), (codes < EMPTY).sum())

    def _bounds(self, b: Array, h: Array, *ends: Array) -> Iterator[tuple[Array, Array]]:
        """What is known of tiles, as `Mask.tile` tells it: by the mask itself, and by intervals where it is opaque."""
        bounds, mask = self.operands.bounds, self.operands.mask
        if bounds is not None:
            assert isinstance(bounds, Lifted)
            yield bounds(b, h, *ends)
        if self.operands.is_opaque and mask is not None and (told := bounds_of(mask, b, h, *ends)) is not None:
            yield told

    def places(self, x: Any) -> tuple[HeadBlock, HeadBlock]:
        """The rows and heads of the queries, and of the keys, of the tile whose first group is x."""
        _, heads, _, kv_heads, _ = self.shape
        num_rows, num_heads, _, _ = tile_shape(self.tiles, self.shape)
        (row, kv_head), shared = _divide(x, kv_heads), heads // kv_heads
        return (
            HeadBlock(row, kv_head * shared, num_rows, num_heads),
            HeadBlock(row, kv_head, num_rows, num_heads // shared),
        )

    def _rows_and_heads(self, x: Any) -> tuple[Array, Array]:
        place, _ = self.places(x)
        first_row, first_head = place.start()
        rows = first_row + jnp.arange(place.num_rows, dtype=jnp.int32)[:, None, None, None]
        heads = first_head + jnp.arange(place.num_heads, dtype=jnp.int32)[None, :, None, None]
        axes = varying_axes(self.operands.q_index)
        return vary(rows, axes), vary(heads, axes)


def forward(
    tiles: Tiles, dropout_rate: float, query: Array, key: Array, value: Array, operands: Operands
) -> tuple[Array, Array]:
    """The attention of every query to these keys.

    Args:
        tiles: the sizes of a tile.
        dropout_rate: used if `operands` have words of the dropout.
        query: (B, N, T, H), scaled, in units of log 2 unless there is a score mod.
        key: (B, K, S, H).
        value: (B, K, S, V).
        operands: mask, score mod, indices and dropout.

    Returns:
        out (B, N, T, V), and the log-sum-exp (B, N, T) in units of log 2.
    """
    walk = _walk(tiles, dropout_rate, operands, _shape(query, key))
    axes, seq_q = varying_axes(query), query.shape[2]
    query, keys = _pad(query, tiles.queries), _prepare_keys(key, value, tiles.keys)
    # A CPU multiplies by a matrix faster than by its transpose.
    key_transposed, value = _finite(keys.key, keys.bias).swapaxes(2, 3), _finite(keys.value, keys.bias)

    def row_of_tiles(step: Any, results: tuple[Array, ...]) -> tuple[Array, ...]:
        x, i = _divide(step, walk.num_queries)
        x = x * tiles.groups
        q_place, kv_place = walk.places(x)
        query_tile = _flat(_cut(query, q_place, i, tiles.queries), tiles.groups)
        order = walk.keys_for(x, i)

        def tile(is_full: bool, n: Any, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
            j = order.nth(n)
            is_plain = is_full and walk.is_plain
            key_tile = _cut_transposed(key_transposed, kv_place, j, tiles.keys, tiles.groups)
            value_tile, bias = (_flat(_cut(x, kv_place, j, tiles.keys), tiles.groups) for x in (value, keys.bias))
            scores = softmax.product(query_tile, key_tile, 1, 0)
            if is_plain:
                # Every query attends every key, so a non-finite one contaminates all sums.
                state = state._replace(sum=state.sum + bias.sum(1, keepdims=True))
            else:
                scores, _ = walk.mask_scores(scores, bias, None if is_full else walk.keep(x, i, j), x, i, j)
            return softmax.update(state, scores, value_tile, masked=not is_plain, dropout=walk.drop(x, i, j), exp2=exp2)

        state = vary_all(softmax.initial_state(query_tile.shape[:2], value.shape[3], query.dtype), axes)
        state = _two_loops(tile, order, state)
        return tuple(
            _put(whole, part, q_place, i, tiles.queries)
            for whole, part in zip(results, softmax.finish(state), strict=True)
        )

    zeros = [jnp.zeros(shape, query.dtype) for shape in ((*query.shape[:3], value.shape[3]), query.shape[:3])]
    steps = walk.num_groups // tiles.groups * walk.num_queries
    out, lse = _loop(steps, row_of_tiles, tuple(vary_all(zeros, axes)))
    return _first(out, seq_q), _first(lse, seq_q)


def backward(
    tiles: Tiles,
    dropout_rate: float,
    rows: BackwardRows,
    key: Array,
    value: Array,
    operands: Operands,
    gradients: tuple[Array, ...],
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """The gradients of query, key and value from these keys, and `gradients` with the share of these keys added.

    `gradients` has the sums so far for the score mod's arrays. The loop runs over tiles of keys, so that each key is
    read once; the gradient of the query is updated in place.
    """
    walk = _walk(tiles, dropout_rate, operands, _shape(rows.query, key))
    axes, dtype, seq_q = varying_axes(rows.query), rows.query.dtype, rows.query.shape[2]
    rows, keys = _pad_rows(rows, tiles.queries), _prepare_keys(key, value, tiles.keys)
    # Sums over queries are products (X, width, M) @ (X, M, St). Queries are transposed once before the loop, and the
    # sums once after it: a CPU contracts the first axes of two matrices at half the speed.
    query_transposed, d_out_transposed = (
        softmax.select(rows.finite[:, :, None], x.swapaxes(2, 3), 0) for x in (rows.query, rows.d_out)
    )
    unit = 1.0 / softmax.unit(has_score_mod=not walk.is_plain)
    cut_queries = partial(_cut_transposed, size=tiles.queries, groups=tiles.groups)

    def column_of_tiles(step: Any, sums: Any) -> Any:
        x, j = _divide(step, walk.num_keys)
        x = x * tiles.groups
        q_place, kv_place = walk.places(x)
        order = walk.queries_for(x, j)
        key_tile, value_tile, bias = (_flat(_cut(x, kv_place, j, tiles.keys), tiles.groups) for x in keys)
        key_tile, value_tile = _finite(key_tile, bias), _finite(value_tile, bias)
        key_transposed, value_transposed = key_tile.swapaxes(1, 2), value_tile.swapaxes(1, 2)

        def tile(is_full: bool, n: Any, sums: Any) -> Any:
            (d_query, gradients), d_key, d_value = sums
            i = order.nth(n)
            is_plain = is_full and walk.is_plain
            # A query that attends a non-finite key has the log-sum-exp NaN: the key need not contaminate again.
            query_tile, d_out_tile, lse_tile, delta_tile = _cut_rows(rows, q_place, i, tiles)
            scores, pull = softmax.product(query_tile, key_transposed, 1, 0), None
            if not is_plain:
                keep = None if is_full else walk.keep(x, i, j)
                scores, pull = walk.mask_scores(scores, bias, keep, x, i, j)
            weights, d_scores = softmax.tile_gradients(
                scores,
                lse_tile[..., None],
                delta_tile[..., None],
                softmax.product(d_out_tile, value_transposed, 1, 0),
                masked=not is_plain,
                dropout=walk.drop(x, i, j),
                exp2=exp2,
            )
            if pull is not None:
                d_scores, gradients = pull(d_scores, gradients)
            d_key = d_key + softmax.product(cut_queries(query_transposed, q_place, i), d_scores, 1, 0)
            d_value = d_value + softmax.product(cut_queries(d_out_transposed, q_place, i), weights, 1, 0)
            share = softmax.product(d_scores, key_tile, 1, 0) * unit
            old = _cut(d_query, q_place, i, tiles.queries)
            d_query = _put(d_query, old + share.reshape(old.shape), q_place, i, tiles.queries)
            return (d_query, gradients), d_key, d_value

        (d_query, gradients), d_key, d_value = sums
        column = [jnp.zeros((tiles.groups, size, tiles.keys), dtype) for size in (key.shape[3], value.shape[3])]
        carried, *column = _two_loops(tile, order, ((d_query, gradients), *vary_all(column, axes)))
        d_key, d_value = (
            _put(whole, part.swapaxes(1, 2) * factor, kv_place, j, tiles.keys)
            for whole, part, factor in zip((d_key, d_value), column, (unit, 1.0), strict=True)
        )
        return carried, d_key, d_value

    zeros = vary_all([jnp.zeros(x.shape, dtype) for x in (rows.query, keys.key, keys.value)], axes)
    steps = walk.num_groups // tiles.groups * walk.num_keys
    (d_query, gradients), *d_keys = _loop(steps, column_of_tiles, ((zeros[0], gradients), zeros[1], zeros[2]))
    d_key, d_value = (_first(x, key.shape[2]) for x in d_keys)
    return _first(d_query, seq_q), d_key, d_value, gradients


def prepare_rows(query: Array, out: Array, lse: Array, d_out: Array, d_lse: Array) -> BackwardRows:
    """The queries of `backward`, from results (lse in units of log 2) and their cotangents."""
    finite = jnp.isfinite(zero_or_nan(query) + zero_or_nan(d_out) + 0 * d_lse + 0 * lse)
    # On a CPU an elementwise product and a sum take 60 times as long.
    delta = jnp.einsum("BNTV,BNTV->BNT", out, d_out, precision=lax.Precision.HIGHEST)
    lse = softmax.select(lse != -jnp.inf, softmax.select(finite, lse, jnp.nan), jnp.inf)
    return BackwardRows(query, d_out, lse, softmax.select(finite, delta - d_lse, 0), finite)


def _shape(query: Any, key: Any) -> Shape:
    batch, heads, seq_q, _ = query.shape
    return batch, heads, seq_q, key.shape[1], key.shape[2]


def _walk(tiles: Tiles, dropout_rate: float, operands: Operands, shape: Shape) -> Walk:
    # Padding repeats the last index: masks and score mods read no array out of range.
    q_index, kv_index = (
        jnp.pad(index, (0, missing), mode="edge") if (missing := -index.shape[0] % size) else index
        for index, size in ((operands.q_index, tiles.queries), (operands.kv_index, tiles.keys))
    )
    return Walk(tiles, dataclasses.replace(operands, q_index=q_index, kv_index=kv_index), shape, dropout_rate)


def _four_axes(x: Array) -> Array:
    """A result of a mask, which broadcasts to (B, N, T, S), with all of these axes."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _pad_rows(rows: BackwardRows, size: int) -> BackwardRows:
    return BackwardRows(
        query=_pad(rows.query, size),
        d_out=_pad(rows.d_out, size, 0),
        lse=_pad(rows.lse, size, jnp.inf),
        delta=_pad(rows.delta, size, 0),
        finite=_pad(rows.finite, size),
    )


def _cut_rows(rows: BackwardRows, place: HeadBlock, tile: Any, tiles: Tiles) -> tuple[Array, Array, Array, Array]:
    """(query, d_out, lse, delta) of a tile, (Xt, N / K * Tt, ...), with zeros in place of non-finite rows."""
    query, d_out, lse, delta, finite = (_flat(_cut(x, place, tile, tiles.queries), tiles.groups) for x in rows)
    query, d_out = (softmax.select(finite[..., None], x, 0) for x in (query, d_out))
    return query, d_out, lse, delta


def _prepare_keys(key: Array, value: Array, size: int) -> Keys:
    bias = zero_or_nan(key) + zero_or_nan(value)
    return Keys(_pad(key, size), _pad(value, size, 0), _pad(bias, size, -jnp.inf))


def _finite(x: Array, bias: Array) -> Array:
    """Keys or values (..., S, H) with 0 in place of the non-finite ones, which have the bias (..., S) NaN."""
    return softmax.select(~jnp.isnan(bias)[..., None], x, 0)


def _pad(x: Array, size: int, fill: Any = None) -> Array:
    """(B, N, L, ...), padded to whole tiles by `fill`, or by the last row: a score mod may not expect scores of 0."""
    missing = -x.shape[2] % size
    widths = ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3))
    if not missing:
        return x
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)


def _first(x: Array, length: int) -> Array:
    """(B, N, L', ...) without the padding of `_pad`."""
    return x if x.shape[2] == length else x[:, :, :length]


def _cut(x: Array, place: HeadBlock, tile: Any, size: int) -> Array:
    """Tile (Bt, Nt, size, ...) of (B, N, L', ...)."""
    shape = place.num_rows, place.num_heads, size, *x.shape[3:]
    if shape == x.shape:
        return x
    return lax.dynamic_slice(x, place.start(tile * size, 0)[: x.ndim], shape, allow_negative_indices=False)


def _cut_transposed(x: Array, place: HeadBlock, tile: Any, size: int, groups: int) -> Array:
    """The tile of `_cut` from (B, N, width, L'), as (Xt, width, N / K * size)."""
    width = x.shape[2]
    shape = place.num_rows, place.num_heads, width, size
    cut = x
    if shape != x.shape:
        cut = lax.dynamic_slice(x, place.start(0, tile * size), shape, allow_negative_indices=False)
    return cut.reshape(groups, -1, width, size).swapaxes(1, 2).reshape(groups, width, -1)


def _flat(x: Array, groups: int) -> Array:
    """(Bt, Nt, Tt, ...) as (Xt, N / K * Tt, ...): heads that share keys are further queries."""
    return x.reshape(groups, -1, *x.shape[3:])


def _put(whole: Array, part: Array, place: HeadBlock, tile: Any, size: int) -> Array:
    """`whole`, as in `_cut`, with one tile replaced by `part`, which has the same elements in the same order."""
    part = part.reshape(place.num_rows, place.num_heads, size, *whole.shape[3:])
    if part.shape == whole.shape:
        return part
    start = place.start(tile * size, 0)[: whole.ndim]
    return lax.dynamic_update_slice(whole, part, start, allow_negative_indices=False)


def _divide(step: Any, count: int) -> tuple[Any, Any]:
    """Quotient and remainder of a non-negative number: `//` needs more equations, for negative numbers."""
    if isinstance(step, int):
        return divmod(step, count)
    whole = jnp.asarray(count, step.dtype)
    return (step, 0) if count == 1 else (lax.div(step, whole), lax.rem(step, whole))


def _at(values: Array, index: Any) -> Array:
    """The element at a non-negative index."""
    return lax.dynamic_index_in_dim(values, index, keepdims=False, allow_negative_indices=False)


def _cut_index(index: Array, tile: Any, size: int) -> Array:
    """The part of (L',) that a tile holds."""
    return lax.dynamic_slice_in_dim(index, tile * size, size, allow_negative_indices=False)


def _ranges(index: Array, size: int) -> tuple[Array, Array]:
    """Least and greatest index of each tile."""
    tiles = index.reshape(-1, size)
    return tiles.min(1), tiles.max(1)


def _two_loops(tile: Callable[[bool, Any, Any], Any], order: Order, state: Any) -> Any:
    """`tile(is_full, n, state)` for the full tiles, then for the partial ones."""
    if isinstance(order.num_full, int):  # all tiles are of one kind
        return _loop(order.num_visited, partial(tile, order.num_full > 0), state)
    state = lax.fori_loop(0, order.num_full, partial(tile, True), state)
    state = lax.fori_loop(order.num_full, order.num_visited, partial(tile, False), state)
    return without_reverse(
        state,
        "attention in tiles has one derivative in reverse mode, and forward-mode derivatives of that (jax.jvp of "
        "jax.grad). Use standard_attention, which has every one.",
    )


def _loop(count: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """`body(step, state)` for every step. One step is no loop: a program of one tile is as small as a dense one."""
    return body(0, state) if count == 1 else lax.fori_loop(0, count, body, state)
