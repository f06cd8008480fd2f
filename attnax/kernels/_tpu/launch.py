"""Calls of the TPU kernels: the blocks that each program reads and writes, and the gradients of captured arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnax.kernels._core.captured import Captured, pair_axes
from attnax.kernels._core.mesh import vary_all, varying_axes, varying_shape
from attnax.kernels._core.operands import Arrays
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.tile import QueryRows, query_rows
from attnax.kernels._tpu.call import Call, on_shards, padded, prepare, round_up
from attnax.kernels._tpu.kernels import (
    d_key_value_kernel,
    d_pairs_kernel,
    d_query_kernel,
    d_table_kernel,
    forward_kernel,
    pairs_place,
)
from attnax.kernels._tpu.tile import Inputs, Kernel, Known, Table
from attnax.kernels._tpu.tile_sizes import LANES, ROWS
from attnax.kernels._tpu.walk import Walk
from attnax.typing import Array

__all__ = ["INTERPRET", "backward", "decode", "forward"]

INTERPRET: Any = True  # or `pltpu.InterpretParams`, which also detects races, and takes three times as long

Block = tuple[tuple[int, ...], Callable[..., tuple[Any, ...]]]
"""The shape of a block, and its number along each axis as a function of the program and `Known`."""


class Place(NamedTuple):
    """Where a program's blocks lie; index maps read it."""

    b: Any
    outer: Any
    h: Any
    i: Any
    j: Any
    known: Known


def _run(
    name: str,
    kernel: Callable[..., None],
    call: Call,
    grid: tuple[Any, ...],
    place: Callable[..., Place],
    outputs: Mapping[str, tuple[Any, Block]],
    scratch: dict[str, Any] | None = None,
    turns: int = 2,
) -> dict[str, Array]:
    """The arrays that a kernel writes.

    Args:
        name: of the kernel in the program.
        kernel: called with `Known`, `Inputs`, outputs and scratch.
        call: its arrays.
        grid: the number of programs along each axis; the last `turns` axes run in order.
        place: of (*program, known).
        outputs: by name, the shape and dtype of an array, and its blocks.
        scratch: by name, shapes in vector memory.
        turns: the number of axes that carry sums.
    """
    call = call.flat()
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((call.known, call.inputs))))
    known, inputs = vary_all((call.known, call.inputs), axes)
    known_leaves, known_tree = jax.tree.flatten(known)

    def block(shape: tuple[int, ...], where: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        def index(*arguments: Any) -> tuple[Any, ...]:
            program, refs = arguments[: len(grid)], arguments[len(grid) :]
            return where(place(*program, jax.tree.unflatten(known_tree, refs)))

        return pl.BlockSpec(shape, index)

    def run(*refs: Any) -> None:
        known, refs = jax.tree.unflatten(known_tree, refs[: len(known_leaves)]), refs[len(known_leaves) :]
        kernel(known, *refs)

    specs = _specs(call, block)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(known_leaves),
        grid=grid,
        in_specs=[specs],
        out_specs={key: block(*of_program) for key, (_, of_program) in outputs.items()},
        scratch_shapes=() if scratch is None else (scratch,),
    )
    semantics: Any = ("parallel",) * (len(grid) - turns) + ("arbitrary",) * turns
    results: dict[str, Array] = pl.pallas_call(
        run,
        grid_spec=spec,
        out_shape={key: varying_shape(x.shape, x.dtype, inputs.query) for key, (x, _) in outputs.items()},
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=call.spec.tile.vmem),
        interpret=INTERPRET if call.spec.interpret else False,
        name=name,
    )(*known_leaves, inputs)
    return results


def _specs(call: Call, block: Callable[..., pl.BlockSpec]) -> Inputs:
    """The blocks of every input."""
    spec, inputs, grid = call.spec, call.inputs, call.spec.grid
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)

    def of_queries(x: Array) -> pl.BlockSpec:
        return block((1, 1, grid.block_q, x.shape[-1]), lambda at: (at.b, at.h, at.i, 0))

    def of_keys(x: Any, turned: bool) -> Any:
        if isinstance(x, tuple):
            return tuple(of_page(pages, n, len(x)) for n, pages in enumerate(x))
        if turned:
            return block((1, 1, x.shape[2], grid.block_kv), lambda at: (at.b, at.h // spec.shared, 0, at.j))
        return block((1, 1, grid.block_kv, x.shape[-1]), lambda at: (at.b, at.h // spec.shared, at.j, 0))

    def of_page(pages: Array, n: int, count: int) -> pl.BlockSpec:
        def where(at: Place) -> tuple[Any, ...]:
            return at.known.block_table[(at.b * grid.num_kv + at.j) * count + n], at.h // spec.shared, 0, 0

        return block((1, 1, *pages.shape[2:]), where)

    def vector(x: Array, of_queries: bool) -> pl.BlockSpec:
        rows, heads = x.shape[:2]

        def where(at: Place) -> tuple[Any, ...]:
            return at.b if rows > 1 else 0, at.h if heads > 1 else 0, 0, at.i if of_queries else at.j

        return block((1, 1, 1, grid.block_q if of_queries else grid.block_kv), where)

    def operand(x: Array, natural: Any) -> pl.BlockSpec:
        return scalar if x.ndim == 1 else vector(x, natural.shape[2] > 1)

    def table(x: Array, how: Table) -> pl.BlockSpec:
        if not how.of_pairs:
            return scalar
        heads = spec.score_shape[1]
        return block(
            (1, grid.block_q, grid.block_kv), lambda at: (at.known.slabs[how.slab][at.b * heads + at.h], at.i, at.j)
        )

    return Inputs(
        of_queries(inputs.query),
        of_keys(inputs.key, spec.turned[0]),
        of_keys(inputs.value, spec.turned[1]),
        scalar,
        None if inputs.dropout is None else scalar,
        tuple(map(operand, inputs.mask, spec.mask_shapes)),
        tuple(map(table, inputs.mask_tables, spec.mask_tables)),
        tuple(map(operand, inputs.mod, spec.mod_shapes)),
        tuple(map(table, inputs.mod_tables, spec.mod_tables)),
        None if inputs.positions is None else tuple(map(vector, inputs.positions, (True, False))),
        None if inputs.d_out is None else of_queries(inputs.d_out),
        None if inputs.lse is None else vector(inputs.lse, True),
        None if inputs.delta is None else vector(inputs.delta, True),
        None if inputs.first is None else scalar,
    )


def _walking(
    name: str,
    kernel: Callable[..., None],
    call: Call,
    count: Array,
    outputs: Mapping[str, tuple[Any, Block]],
    scratch: dict[str, Any],
    turns: int = 2,
) -> dict[str, Array]:
    """The arrays that a kernel writes which visits the tiles of a list."""
    walk, (batch, heads, *_) = call.spec.walk, call.spec.score_shape

    def place(b: Any, outer: Any, n: Any, inner: Any, known: Known) -> Place:
        i, j = walk.tile(known.words, b, outer, n)
        return Place(b, outer, walk.head(outer, inner), i, j, known)

    # Under vmap JAX 0.12 forgets the size of a grid that is not mapped where other numbers of scalar memory are.
    count = count + 0 * sum(x.reshape(-1)[0] for x in jax.tree.leaves(call.known))
    grid = batch, heads // walk.inner, count, walk.inner
    return _run(name, kernel, call, grid, place, outputs, scratch, turns)


def forward(arrays: Arrays, setup: Setup, *, low: bool) -> tuple[Array, Array, Array | None]:
    """The attention of every query.

    Returns:
        out (B, N, T, V), lse (B, N, T) float32 in units of log 2, and if `low` the rounding error of out, in the same
        dtype.
    """
    query = arrays[0]
    call = prepare(arrays, setup)
    return _forward("attnax_forward", call, 1, jnp.dtype(jnp.float32 if setup.is_wide else query.dtype), low=low)


def decode(arrays: Arrays, setup: Setup, pages: Array | None) -> tuple[Array, Array]:
    """(out, lse) in float32 of a few queries over many keys; the heads that share keys take turns at each tile.

    Args:
        arrays: with `pages`, key and value are pages (P, K, page, H).
        setup: the other arguments.
        pages: int32 (B, num_pages), the block table; None for keys in one piece.
    """
    call = prepare(arrays, setup, pages)
    out, lse, _ = _forward("attnax_decode", call, call.spec.shared, jnp.dtype(jnp.float32), low=False)
    return out, lse


def _forward(name: str, call: Call, inner: int, dtype: Any, *, low: bool) -> tuple[Array, Array, Array | None]:
    return on_shards(partial(_forward_of_shard, name, inner, dtype, low), call)


def _forward_of_shard(name: str, inner: int, dtype: Any, low: bool, call: Call) -> tuple[Array, Array, Array | None]:
    call, count = call.walk(inner)
    spec, inputs = call.spec, call.inputs
    (batch, heads, seq_q, _), block_q, head_dim = spec.score_shape, spec.grid.block_q, inputs.query.shape[-1]
    value_dim, length = jax.tree.leaves(inputs.value)[0].shape[2 if spec.turned[1] else 3], inputs.query.shape[2]
    wide: Block = (1, inner, block_q, value_dim), lambda at: (at.b, at.outer, at.i, 0)
    outputs = {
        "out": (jax.ShapeDtypeStruct((batch, heads, length, value_dim), dtype), wide),
        "lse": _rows_of(call, inner),
    }
    if low:
        outputs["low"] = outputs["out"]
    scratch = {
        "query": pltpu.VMEM((inner, block_q, head_dim), inputs.query.dtype),
        "acc": pltpu.VMEM((inner, block_q, value_dim), jnp.float32),
        "max": pltpu.VMEM((inner, block_q, 1), jnp.float32),
        "sum": pltpu.VMEM((inner, block_q, 1), jnp.float32),
    }
    results = _walking(name, partial(forward_kernel, spec), call, count, outputs, scratch)
    out, *rest = (results[key][:, :, :seq_q] for key in ("out", "low")[: 1 + low])
    return out, results["lse"][:, :, 0, :seq_q], rest[0] if low else None


def _rows_of(call: Call, inner: int = 1) -> tuple[Any, Block]:
    """A float32 number for each query, (B, N, 1, T)."""
    batch, heads = call.spec.score_shape[:2]
    array = jax.ShapeDtypeStruct((batch, heads, 1, call.inputs.query.shape[2]), jnp.float32)
    return array, ((1, inner, 1, call.spec.grid.block_q), lambda at: (at.b, at.outer, 0, at.i))


def backward(
    arrays: Arrays, setup: Setup, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """The gradients of query (see `Setup.learn_scale`), key, value and the score mod's floating values.

    Args:
        arrays: as in `forward`.
        setup: as in `forward`.
        out: the result, float32.
        lse: the result, in units of log 2.
        d_out: cotangent of out.
        d_lse: cotangent of the natural log-sum-exp.
    """
    query, key, *_ = arrays
    rows = _query_rows(query, key.shape[1], out, lse, d_out, d_lse)
    call = prepare(arrays, setup)
    length, known = call.inputs.query.shape[2], call.known
    call = call._replace(
        known=known._replace(any_non_finite=known.any_non_finite | rows.any_contaminated.astype(jnp.int32)),
        inputs=call.inputs._replace(
            d_out=padded(rows.d_out, length, 2),
            lse=padded(rows.lse, length, 2, jnp.inf)[:, :, None],
            delta=padded(rows.delta, length, 2)[:, :, None],
        ),
    )
    of_query, of_key = (jnp.dtype(jnp.float32 if wide else query.dtype) for wide in (setup.learn_scale, setup.is_wide))
    by_query = on_shards(partial(_d_query, of_query), call)
    by_key = on_shards(partial(_d_key_value, of_key), call)
    d_learned: tuple[Array, ...] = ()
    captured = setup.captured(arrays)
    if captured is not None:
        sums = {int(name[4:]): x[:, :, 0] for name, x in {**by_query, **by_key}.items() if name.startswith("mod ")}
        tables = _reader(call).learned("tables")
        d_learned = captured.gradients(sums, tables, partial(_table_gradient, call, captured))
    seq_q, seq_kv = call.spec.score_shape[2:]
    d_key, d_value = by_key["d_key"][:, :, :seq_kv], by_key["d_value"][:, :, :seq_kv]
    return by_query["d_query"][:, :, :seq_q], d_key, d_value, d_learned


def _query_rows(query: Array, kv_heads: int, out: Array, lse: Array, d_out: Array, d_lse: Array) -> QueryRows:
    """`query_rows`, with as many rows as registers hold: else libtpu takes 8 s more to compile their sums."""
    seq_q = query.shape[2]
    if seq_q % ROWS == 0:
        return query_rows(query, kv_heads, out, lse, d_out, d_lse)
    given = (query, 0), (out, 0), (lse, -jnp.inf), (d_out, 0), (d_lse, 0)
    whole = lax.optimization_barrier([padded(x, round_up(seq_q, ROWS), 2, fill) for x, fill in given])
    rows = query_rows(whole[0], kv_heads, *whole[1:])
    return rows._replace(d_out=d_out, lse=rows.lse[:, :, :seq_q], delta=rows.delta[:, :, :seq_q])


def _reader(call: Call) -> Kernel:
    return Kernel(call.spec, call.known, call.inputs)


def _d_query(dtype: Any, call: Call) -> dict[str, Array]:
    call, count = call.walk(1)
    spec, inputs, block_q = call.spec, call.inputs, call.spec.grid.block_q
    head_dim, learn = inputs.query.shape[-1], _reader(call).learned("rows")
    block: Block = (1, 1, block_q, head_dim), lambda at: (at.b, at.h, at.i, 0)
    outputs = {"d_query": (jax.ShapeDtypeStruct(inputs.query.shape, dtype), block)}
    outputs |= {f"mod {n}": _rows_of(call) for n in learn}
    scratch = _query_scratch(call) | {"d_query": pltpu.VMEM((block_q, head_dim), jnp.float32)}
    scratch |= {f"mod {n}": pltpu.VMEM((block_q, 1), jnp.float32) for n in learn}
    return _walking("attnax_d_query", partial(d_query_kernel, spec), call, count, outputs, scratch)


def _query_scratch(call: Call) -> dict[str, Any]:
    inputs, block_q = call.inputs, call.spec.grid.block_q
    return {
        "query": pltpu.VMEM((block_q, inputs.query.shape[-1]), inputs.query.dtype),
        "d_out": pltpu.VMEM((block_q, inputs.d_out.shape[-1]), inputs.d_out.dtype),
        "lse": pltpu.VMEM((block_q, 1), jnp.float32),
        "delta": pltpu.VMEM((block_q, 1), jnp.float32),
    }


def _d_key_value(dtype: Any, call: Call) -> dict[str, Array]:
    call, count = call.walk(call.spec.shared, turned=True)
    spec, inputs, block_kv = call.spec, call.inputs, call.spec.grid.block_kv
    (batch, heads), inner, learn = spec.score_shape[:2], spec.shared, _reader(call).learned("columns")
    outputs: dict[str, tuple[Any, Block]] = {}
    scratch = {}
    for name, x in (("key", inputs.key), ("value", inputs.value)):
        block: Block = (1, 1, block_kv, x.shape[-1]), lambda at: (at.b, at.outer, at.j, 0)
        outputs[f"d_{name}"] = jax.ShapeDtypeStruct(x.shape, dtype), block
        scratch[name] = pltpu.VMEM((block_kv, x.shape[-1]), x.dtype)
        scratch[f"d_{name}"] = pltpu.VMEM((block_kv, x.shape[-1]), jnp.float32)
    row: Block = (1, inner, 1, block_kv), lambda at: (at.b, at.outer, 0, at.j)
    of_columns = jax.ShapeDtypeStruct((batch, heads, 1, inputs.key.shape[2]), jnp.float32), row
    outputs |= {f"mod {n}": of_columns for n in learn}
    scratch |= {f"mod {n}": pltpu.VMEM((inner, 1, block_kv), jnp.float32) for n in learn}
    return _walking("attnax_d_key_value", partial(d_key_value_kernel, spec), call, count, outputs, scratch)


def _table_gradient(call: Call, captured: Captured, n: int) -> Array:
    """The gradient of a table from one of its reads, for each slab."""
    read, (batch, heads, seq_q, seq_kv) = captured.split.reads[n], call.spec.score_shape
    if captured.how_to_learn(read) == "pairs":
        index = captured.split.index_in_bounds(read, captured.score_shape)
        outer = [x for axis, x in enumerate(index) if axis not in read.axes and x is not None]
        summed = tuple(axis for axis in (0, 1) if all(x.shape[axis] == 1 for x in outer))
        total = on_shards(partial(_d_pairs, n, summed), call)[:, :, :seq_q, :seq_kv]
        if any(total.shape[axis] > 1 for axis in summed):  # a sum for each shard
            total = total.sum(summed, keepdims=True)
        axes = pair_axes(read, index, call.spec.score_shape)
        return total if axes == read.axes else total.swapaxes(2, 3)  # the table may have keys before queries
    sizes = [read.shape[axis] for axis in read.axes]
    elements = math.prod(sizes)
    total = on_shards(partial(_d_table, n, elements), call)
    return total.reshape(batch, heads, *sizes)


def _d_table(n: int, elements: int, call: Call) -> Array:
    call, count = call.walk(1)
    (batch, heads), size = call.spec.score_shape[:2], round_up(elements, LANES)
    block: Block = (1, 1, 1, size), lambda at: (at.b, at.h, 0, 0)
    outputs = {"table": (jax.ShapeDtypeStruct((batch, heads, 1, size), jnp.float32), block)}
    kernel = partial(d_table_kernel, call.spec, n)
    total = _walking("attnax_d_table", kernel, call, count, outputs, _query_scratch(call))["table"]
    return total[:, :, 0, :elements]


def _d_pairs(n: int, summed: tuple[int, ...], call: Call) -> Array:
    spec, (batch, heads, *_), grid = call.spec, call.spec.score_shape, call.spec.grid
    slabs = 1 if 0 in summed else batch, 1 if 1 in summed else heads
    rows, columns = call.codes.shape[:2]
    walk = Walk((rows, columns, 0), 0, 1, turned=False)  # the words are the codes of all tiles
    call = call._replace(spec=dataclasses.replace(spec, walk=walk), known=call.known._replace(words=call.codes))

    def place(row: Any, head: Any, i: Any, j: Any, turn: Any, known: Known) -> Place:
        at, _, _ = pairs_place(call.spec, slabs, row, head, i, j, turn)
        return Place(row, head, at.h, i, j, known)._replace(b=at.b)

    table = jax.ShapeDtypeStruct((*slabs, call.inputs.query.shape[2], call.inputs.key.shape[2]), jnp.float32)
    where = _outer_of(slabs)
    outputs = {"table": (table, ((1, 1, grid.block_q, grid.block_kv), where))}
    programs = *slabs, grid.num_q, grid.num_kv, (batch // slabs[0]) * (heads // slabs[1])
    kernel = partial(d_pairs_kernel, call.spec, n, slabs)
    return _run("attnax_d_pairs", kernel, call, programs, place, outputs, turns=1)["table"]


def _outer_of(slabs: tuple[int, ...]) -> Callable[[Place], tuple[Any, ...]]:
    return lambda at: (at.b if slabs[0] > 1 else 0, at.h if slabs[1] > 1 else 0, at.i, at.j)
