"""Exact attention as Pallas kernels for TPUs.

A program computes one tile of pairs. Programs run in the order of `_tpu/walk.py`: the tiles of a row follow each other,
sums stay in scratch memory, and the last program of a row writes them. `_tpu/tile.py` reads the blocks of a tile, and
`_core/tile.py` has the work at one tile.

    forward       out, lse          rows are tiles of queries
    d_query       dq, mod's rows    rows are tiles of queries
    d_key_value   dk, dv, columns   rows are tiles of keys; the heads that share them take turns
    d_table       a mod's tables    rows are tiles of queries
    d_pairs       a mod's tables    every tile of pairs; the rows and heads that share a slab take turns
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attnax.kernels._core import softmax
from attnax.kernels._core.tile import QueryTile, TilePlace
from attnax.kernels._core.tile_codes import EMPTY
from attnax.kernels._tpu.tile import Inputs, Kernel, Known, Spec, rows_finite
from attnax.typing import Array

__all__ = ["d_key_value_kernel", "d_pairs_kernel", "d_query_kernel", "d_table_kernel", "forward_kernel"]

Scratch = dict[str, Any]


def forward_kernel(spec: Spec, known: Known, inputs: Inputs, outputs: dict[str, Any], scratch: Scratch) -> None:
    """One more tile of keys for a tile of queries: scratch holds a softmax state for each head that takes turns."""
    kernel = Kernel(spec, known, inputs)
    step = kernel.step()
    place, n = step.place, step.inner

    @pl.when(step.is_first)
    def _() -> None:
        query = inputs.query[0, 0]
        scratch["query"][n] = jnp.where(rows_finite(query), query, 0)
        state = softmax.initial_state((spec.grid.block_q,), scratch["acc"].shape[-1], jnp.dtype(jnp.float32))
        _keep(scratch, n, state)

    def visit(full: bool) -> None:
        key, value, finite = kernel.keys(place, full=full)
        bias = None if full else kernel.bias(place, finite, own_queries=False, own_keys=True)
        scores, _ = kernel.scores(scratch["query"][n], key, place, bias, full=full)
        masked = not full or not spec.is_plain
        _keep(scratch, n, softmax.update(_kept(scratch, n), scores, value, masked=masked, dropout=kernel.drop(place)))

    kernel.visit(step, visit)

    @pl.when(step.is_last)
    def _() -> None:
        state = _kept(scratch, n)
        finite = rows_finite(inputs.query[0, 0])
        contamination = jnp.where(finite | (state.sum[:, None] == 0), 0.0, jnp.nan)
        out, lse = softmax.finish(state)
        out = out + contamination
        outputs["lse"][0, n] = jnp.transpose(lse[:, None] + contamination)
        high = out.astype(outputs["out"].dtype)
        outputs["out"][0, n] = high
        if "low" in outputs:
            outputs["low"][0, n] = (out - high.astype(jnp.float32)).astype(high.dtype)


def _keep(scratch: Scratch, n: Any, state: softmax.SoftmaxState) -> None:
    scratch["acc"][n] = state.acc
    scratch["max"][n] = state.max[:, None]
    scratch["sum"][n] = state.sum[:, None]


def _kept(scratch: Scratch, n: Any) -> softmax.SoftmaxState:
    return softmax.SoftmaxState(scratch["acc"][n], scratch["max"][n][:, 0], scratch["sum"][n][:, 0])


def d_query_kernel(spec: Spec, known: Known, inputs: Inputs, outputs: dict[str, Any], scratch: Scratch) -> None:
    """One more tile of keys for the gradients of a tile of queries, and of the score mod's operands for them."""
    kernel = Kernel(spec, known, inputs)
    step, learn = kernel.step(), kernel.learned("rows")
    place = step.place

    @pl.when(step.is_first)
    def _() -> None:
        _keep_queries(scratch, kernel.queries(place))
        for name in ("d_query", *(f"mod {n}" for n in learn)):
            scratch[name][...] = jnp.zeros_like(scratch[name])

    def visit(full: bool) -> None:
        key, value, _ = kernel.keys(place, full=full)
        _, d_raw, d_learned = kernel.gradients(
            place, _kept_queries(scratch), key, value, "rows", full=full, own_keys=True
        )
        scratch["d_query"][...] += softmax.product(d_raw, key, 1, 0)
        for n, x in zip(learn, d_learned, strict=True):
            scratch[f"mod {n}"][...] += x.astype(jnp.float32)

    kernel.visit(step, visit)

    @pl.when(step.is_last)
    def _() -> None:
        d_query = scratch["d_query"][...]
        d_query = d_query if spec.learn_scale else d_query * inputs.scale[0]
        outputs["d_query"][0, 0] = d_query.astype(outputs["d_query"].dtype)
        for n in learn:
            outputs[f"mod {n}"][0, 0] = jnp.transpose(scratch[f"mod {n}"][...])


def _keep_queries(scratch: Scratch, queries: QueryTile) -> None:
    """Keeps the queries of a row of tiles, with the vectors turned to columns."""
    scratch["query"][...] = queries.query
    scratch["d_out"][...] = queries.d_out
    scratch["lse"][...] = jnp.transpose(queries.lse)
    scratch["delta"][...] = jnp.transpose(queries.delta)


def _kept_queries(scratch: Scratch) -> QueryTile:
    return QueryTile(*(scratch[name][...] for name in ("query", "d_out", "lse", "delta")))


def d_key_value_kernel(spec: Spec, known: Known, inputs: Inputs, outputs: dict[str, Any], scratch: Scratch) -> None:
    """One more tile of queries for the gradients of a tile of keys, and of the score mod's operands for them."""
    kernel = Kernel(spec, known, inputs)
    step, learn = kernel.step(), kernel.learned("columns")
    place, inner = step.place, step.inner

    @pl.when(step.is_first & (inner == 0))
    def _() -> None:
        key, value, _ = kernel.keys(place)
        scratch["key"][...], scratch["value"][...] = key, value
        for name in ("d_key", "d_value", *(f"mod {n}" for n in learn)):
            scratch[name][...] = jnp.zeros_like(scratch[name])

    def visit(full: bool) -> None:
        queries = kernel.queries(place, full=full)
        key, value = scratch["key"][...], scratch["value"][...]
        weights, d_raw, d_learned = kernel.gradients(place, queries, key, value, "columns", full=full, own_queries=True)
        scratch["d_value"][...] += softmax.product(weights, queries.d_out, 1, 0)
        scratch["d_key"][...] += softmax.product(d_raw, queries.query, 1, 0)
        for n, x in zip(learn, d_learned, strict=True):
            scratch[f"mod {n}"][inner] += jnp.transpose(x.astype(jnp.float32))  # a column takes 128 times its size

    kernel.visit(step, visit)

    @pl.when(step.is_last)
    def _() -> None:
        for n in learn:
            outputs[f"mod {n}"][0, inner] = scratch[f"mod {n}"][inner]

    @pl.when(step.is_last & (inner == spec.walk.inner - 1))
    def _() -> None:
        d_key = scratch["d_key"][...] * inputs.scale[0]
        outputs["d_key"][0, 0] = d_key.astype(outputs["d_key"].dtype)
        outputs["d_value"][0, 0] = scratch["d_value"][...].astype(outputs["d_value"].dtype)


def d_table_kernel(
    spec: Spec, read: int, known: Known, inputs: Inputs, outputs: dict[str, Any], scratch: Scratch
) -> None:
    """One more tile for the gradient of a small table for one of its reads, a slab for each row and head."""
    kernel, score_mod = Kernel(spec, known, inputs), spec.score_mod
    assert score_mod is not None
    step, total = kernel.step(), outputs["table"]
    place, at = step.place, score_mod.reads[read]
    lanes = lax.broadcasted_iota(jnp.int32, total.shape[2:], 1)

    @pl.when(step.is_first)
    def _() -> None:
        _keep_queries(scratch, kernel.queries(place))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def visit(full: bool) -> None:
        key, value, _ = kernel.keys(place, full=full)
        share = _share_of_table(kernel, place, _kept_queries(scratch), key, value, read, full=full)
        element = jnp.broadcast_to(kernel.element(at, kernel.index_of(at, place)), share.shape)

        def add(e: Any, sums: Array) -> Array:
            return jnp.where(lanes == e, sums + jnp.where(element == e, share, 0.0).sum(), sums)

        total[0, 0] = lax.fori_loop(element.min(), element.max() + 1, add, total[0, 0])

    kernel.visit(step, visit)


def d_pairs_kernel(
    spec: Spec, read: int, slabs: tuple[int, int], known: Known, inputs: Inputs, outputs: dict[str, Any]
) -> None:
    """The gradient of a table with an element for each pair, for one of its reads, summed over the rows and heads.

    The grid is (slabs' rows, slabs' heads, num_q, num_kv, rows and heads that share a slab); words are tile codes.
    """
    kernel, grid = Kernel(spec, known, inputs), spec.grid
    place, turn, codes = pairs_place(spec, slabs, *(pl.program_id(axis) for axis in range(5)))
    total = outputs["table"]

    @pl.when(turn == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    code = known.words[(codes * grid.num_q + place.i) * grid.num_kv + place.j]

    @pl.when(code != EMPTY)
    def _() -> None:
        key, value, _ = kernel.keys(place)
        total[0, 0] += _share_of_table(kernel, place, kernel.queries(place), key, value, read, full=False)


def pairs_place(
    spec: Spec, slabs: tuple[int, int], row: Any, head: Any, i: Any, j: Any, turn: Any
) -> tuple[TilePlace, Any, Any]:
    """(place, turn, row of the codes) of a program of `d_pairs_kernel`."""
    per_head = spec.score_shape[1] // slabs[1]
    b, h = row + turn // per_head, head + turn % per_head
    rows, columns, _ = spec.walk.list_shape
    return TilePlace(b, h, i, j), turn, (b if rows > 1 else 0) * columns + (h if columns > 1 else 0)


def _share_of_table(
    kernel: Kernel, place: TilePlace, queries: QueryTile, key: Array, value: Array, read: int, *, full: bool
) -> Array:
    """The gradient of the elements that the pairs of a tile read."""
    *_, d_learned = kernel.gradients(place, queries, key, value, "tables", full=full, own_queries=True, own_keys=True)
    share: Array = d_learned[kernel.learned("tables").index(read)].astype(jnp.float32)
    return share
