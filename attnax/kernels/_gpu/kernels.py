"""Exact attention as Pallas kernels for NVIDIA GPUs.

One program computes the results of one tile of queries (of keys, in the second backward kernel). The program visits
the listed tiles of the other side: full tiles, then partial tiles. `_gpu/tile.py` has the work at one tile. No two
programs write the same element, so results are repeatable.

    forward       out, lse          a program for each tile of queries, loops over keys
    d_query       dq, mod's rows    a program for each tile of queries, loops over keys
    d_key_value   dk, dv, columns   a program for each tile of keys, loops over the heads that share them and queries
    d_tables      a mod's tables    a program for each tile of queries, or for each tile of pairs

Only this file, `_gpu/tile.py` and `_core/platform.py` know the Triton backend of Pallas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attnax.kernels._core import softmax
from attnax.kernels._core.mesh import vary, varying_axes, varying_shape
from attnax.kernels._core.tile import KernelSpec, TilePlace
from attnax.kernels._gpu.tile import Inputs, Kernel, either, rows_finite
from attnax.kernels._gpu.tile_lists import TileList
from attnax.kernels._gpu.tile_sizes import Footprint, running_card
from attnax.typing import Array

__all__ = [
    "Shapes",
    "d_key_value_kernel",
    "d_pairs_kernel",
    "d_query_kernel",
    "d_table_kernel",
    "forward_kernel",
    "run",
]

Visitor = Callable[[bool, Any, Any], Any]


def visit_keys(kernel: Kernel, visit: Visitor, place: TilePlace, state: Any, part: tuple[Any, int] = (0, 1)) -> Any:
    """`visit(full, j, state)` for the tiles of keys that the tile of queries attends, or a part of them."""
    grid = kernel.spec.grid
    where: Any = (place.b, place.h, place.i)
    num_full: Any = grid.num_kv - (not grid.even_kv)
    if not grid.even_q:  # as in a list: a tile that is not whole is never full
        num_full = either(place.i == grid.num_q - 1, 0, num_full)
    no_full = kernel.no_full_tiles(place.b, place.h)
    return _visit(visit, kernel.inputs.tiles, where, grid.num_kv, num_full, no_full, state, part)


def visit_queries(kernel: Kernel, visit: Visitor, place: TilePlace, state: Any) -> Any:
    """`visit(full, i, state)` for the tiles of queries that attend the tile of keys."""
    grid = kernel.spec.grid
    where, num_full = (place.b, place.h, place.j), grid.num_q - (not grid.even_q)
    no_full = kernel.no_full_tiles(place.b, place.h)
    return _visit(visit, kernel.inputs.turned, where, grid.num_q, num_full, no_full, state)


def _visit(
    visit: Visitor,
    tiles: TileList | None,
    where: tuple[Any, Any, Any],
    count: int,
    num_full: Any,
    no_full: Any,
    state: Any,
    part: tuple[Any, int] = (0, 1),
) -> Any:
    """`visit(full, tile, state)` for the tiles that a list names at (b, h, row) = `where`, or for all of `count`.

    Without a list the first `num_full` tiles are full. `no_full` says whether all tiles count as partial; None for yes.
    `part` = (n, parts) cuts the tiles into equal parts and visits only part n.
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
    middle = first if no_full is None else either(no_full, first, jnp.clip(num_full, first, last))

    def loop(first: Any, last: Any, state: Any, *, full: bool) -> Any:
        return lax.fori_loop(first, last, lambda n, state: visit(full, tile(n), state), state)

    if no_full is not None:
        state = loop(first, middle, state, full=True)
    return loop(middle, last, state, full=False)


def forward_kernel(spec: KernelSpec, parts: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The attention of a tile of queries, or its state over one of several parts of the keys."""
    kernel, grid = Kernel(spec, inputs), spec.grid
    step, h, b = (pl.program_id(axis) for axis in range(3))
    i = grid.num_q - 1 - step // parts  # under a causal mask the last tiles have the most work, so they start first
    start = TilePlace(b, h, i, 0)
    rows = b, h, pl.ds(grid.q_first(i), grid.block_q)
    query = inputs.query[(*rows, slice(None))]
    finite = rows_finite(query)
    query = jnp.where(finite[:, None], query, 0)

    def visit(full: bool, j: Any, state: softmax.SoftmaxState) -> softmax.SoftmaxState:
        place = start._replace(j=j)
        key, value, finite = kernel.keys(place, full=full)
        bias = None if full else kernel.bias(place, finite, own_queries=False, own_keys=True)
        scores, _ = kernel.scores(query, key, place, bias, full=full)
        masked = not full or not spec.is_plain
        return softmax.update(state, scores, value, masked=masked, dropout=kernel.drop(place))

    state = softmax.initial_state((grid.block_q,), inputs.value.shape[-1], jnp.dtype(jnp.float32))
    state = visit_keys(kernel, visit, start, state, (step % parts, parts))
    own = kernel.own(i, of_queries=True)
    contamination = jnp.where(finite | (state.sum == 0), 0.0, jnp.nan)
    if "acc" in outputs:
        at = (b, h, step % parts, rows[2])
        kernel.write(outputs["acc"], (*at, slice(None)), state.acc, own)
        kernel.write(outputs["max"], at, state.max, own)
        kernel.write(outputs["sum"], at, state.sum + contamination, own)
        return
    out, lse = softmax.finish(state)
    out, lse = out + contamination[:, None], lse + contamination
    kernel.write(outputs["lse"], rows, lse, own)
    high = out.astype(outputs["out"].dtype)
    kernel.write(outputs["out"], (*rows, slice(None)), high, own)
    if "low" in outputs:
        low = (out - high.astype(jnp.float32)).astype(high.dtype)
        kernel.write(outputs["low"], (*rows, slice(None)), low, own)


def d_query_kernel(spec: KernelSpec, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradients of a tile of queries, and of the score mod's operands for them."""
    kernel, grid = Kernel(spec, inputs), spec.grid
    step, h, b = (pl.program_id(axis) for axis in range(3))
    start = TilePlace(b, h, grid.num_q - 1 - step, 0)
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
    d_query, learned = visit_keys(kernel, visit, start, state)
    rows, own = (b, h, pl.ds(grid.q_first(start.i), grid.block_q)), kernel.own(start.i, of_queries=True)
    d_query = d_query if spec.learn_scale else d_query * inputs.scale[0]
    kernel.write(outputs["d_query"], (*rows, slice(None)), d_query.astype(outputs["d_query"].dtype), own)
    for n, x in zip(learn, learned, strict=True):
        kernel.write(outputs[f"mod {n}"], rows, x.reshape(grid.block_q), own)


def d_key_value_kernel(spec: KernelSpec, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradients of a tile of keys and values, and of the score mod's operands for them."""
    kernel, grid = Kernel(spec, inputs), spec.grid
    j, kv_head, b = (pl.program_id(axis) for axis in range(3))
    key, value, _ = kernel.keys(TilePlace(b, kv_head * spec.shared, 0, j))
    learn = kernel.learned("columns")
    columns, own = pl.ds(grid.kv_first(j), grid.block_kv), kernel.own(j, of_queries=False)

    def head(n: Any, sums: Any) -> Any:
        h = kv_head * spec.shared + n

        def visit(full: bool, i: Any, state: Any) -> Any:
            place = TilePlace(b, h, i, j, turned=True)
            (d_key, d_value), learned = state
            queries = kernel.queries(place, full=full)
            weights, d_raw, d_learned = kernel.gradients(
                place, queries, key, value, "columns", full=full, own_queries=True
            )
            d_value = d_value + softmax.product(weights, queries.d_out, 1, 0)
            d_key = d_key + softmax.product(d_raw, queries.query, 1, 0)
            return (d_key, d_value), tuple(x + y.astype(x.dtype) for x, y in zip(learned, d_learned, strict=True))

        state = sums, tuple(jnp.zeros((grid.block_kv, 1), jnp.float32) for _ in learn)
        sums, learned = visit_queries(kernel, visit, TilePlace(b, h, 0, j), state)
        for operand, x in zip(learn, learned, strict=True):
            kernel.write(outputs[f"mod {operand}"], (b, h, columns), x.reshape(grid.block_kv), own)
        return sums

    sums = tuple(jnp.zeros((grid.block_kv, x.shape[-1]), jnp.float32) for x in (key, value))
    d_key, d_value = lax.fori_loop(0, spec.shared, head, sums)
    where = b, kv_head, columns, slice(None)
    kernel.write(outputs["d_key"], where, (d_key * inputs.scale[0]).astype(outputs["d_key"].dtype), own)
    kernel.write(outputs["d_value"], where, d_value.astype(outputs["d_value"].dtype), own)


def d_table_kernel(spec: KernelSpec, n: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradient of a table for one of its reads, summed over some tiles of queries and all their keys.

    A program holds a part of the table. For each tile the program loops over the elements from the first to the last
    one that the tile reads. In a table by distance these elements are few.
    """
    kernel, score_mod, num_q = Kernel(spec, inputs), spec.score_mod, spec.grid.num_q
    assert score_mod is not None
    group, h, b = (pl.program_id(axis) for axis in range(3))
    _, _, chunks, groups, size = outputs["table"].shape
    group, chunk = group // chunks, group % chunks
    read, begin = score_mod.reads[n], chunk * size
    elements = begin + jnp.arange(size, dtype=jnp.int32)

    def row(i: Any, total: Array) -> Array:
        start = TilePlace(b, h, i, 0)
        queries = kernel.queries(start)

        def visit(full: bool, j: Any, total: Array) -> Array:
            place = start._replace(j=j)
            where = kernel.index_of(read, place)
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

        return visit_keys(kernel, visit, start, total)

    count = -(-num_q // groups)
    rows = group * count, jnp.minimum((group + 1) * count, num_q)
    outputs["table"][b, h, chunk, group, :] = lax.fori_loop(*rows, row, jnp.zeros(size, jnp.float32))


def d_pairs_kernel(spec: KernelSpec, n: int, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """The gradient of a table with an element for each pair, for one of its reads, summed over rows and heads."""
    kernel, grid = Kernel(spec, inputs), spec.grid
    step, head, row = (pl.program_id(axis) for axis in range(3))
    rows, heads = outputs["table"].shape[:2]
    i, j = step // grid.num_kv, step % grid.num_kv
    num_rows, num_heads = spec.score_shape[0] // rows, spec.score_shape[1] // heads

    def add(b: Any, h: Any, total: Array) -> Array:
        place = TilePlace(row + b, head + h, i, j)

        def visit(_: Any, total: Array) -> Array:
            key, value, _ = kernel.keys(place)
            *_, d_learned = kernel.gradients(place, kernel.queries(place), key, value, "tables")
            return total + d_learned[kernel.learned("tables").index(n)].astype(jnp.float32)

        return lax.fori_loop(0, kernel.is_visited(place), visit, total)

    total = jnp.zeros((grid.block_q, grid.block_kv), jnp.float32)
    total = lax.fori_loop(0, num_rows, lambda b, total: lax.fori_loop(0, num_heads, partial(add, b), total), total)
    where = row, head, pl.ds(grid.q_first(i), grid.block_q), pl.ds(grid.kv_first(j), grid.block_kv)
    rows_own, columns_own = kernel.own(i, of_queries=True), kernel.own(j, of_queries=False)
    own = None if rows_own is None else rows_own[:, None]
    if columns_own is not None:
        own = columns_own[None, :] if own is None else own & columns_own[None, :]
    kernel.write(outputs["table"], where, total, own)


Shapes = dict[str, tuple[tuple[int, ...], Any]]


def run(
    name: str, kernel: Callable[..., None], spec: KernelSpec, grid: tuple[int, ...], inputs: Inputs, shapes: Shapes
) -> dict[str, Array]:
    """The arrays that a kernel writes: `kernel(inputs, outputs)` runs for each program of a grid."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(inputs)))
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape={key: varying_shape(shape, dtype, inputs.query) for key, (shape, dtype) in shapes.items()},
        compiler_params=None if spec.interpret else _compiler_params(name, spec, inputs),
        interpret=spec.interpret,
        name=name,
    )(inputs)


def _compiler_params(name: str, spec: KernelSpec, inputs: Inputs) -> Any:
    from jax.experimental.pallas import triton  # not every JAX has it, and interpreted kernels do without

    kind = {"attnax_forward": "forward", "attnax_decode": "decode"}.get(name, "backward")
    sizes = inputs.query.shape[-1], inputs.value.shape[-1], 8 * inputs.query.dtype.itemsize
    pair_bytes = sum(function.pair_bytes for function in (spec.mask, spec.score_mod) if function is not None)
    tile = Footprint(kind, spec.tile, *sizes, pair_bytes).fitted(running_card()).tile
    return triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
