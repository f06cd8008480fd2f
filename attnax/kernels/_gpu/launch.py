"""Calls of the GPU kernels: their inputs, their results, and the gradients of captured arrays.

This file does not depend on the kind of GPU; the kernels are in `_gpu/kernels.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnax.kernels._core import softmax
from attnax.kernels._core.captured import Captured, is_each
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.operands import Arrays
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.split import split
from attnax.kernels._core.tile import KernelSpec, query_rows
from attnax.kernels._core.tile_grid import tile_codes
from attnax.kernels._gpu.kernels import (
    Shapes,
    d_key_value_kernel,
    d_pairs_kernel,
    d_query_kernel,
    d_table_kernel,
    forward_kernel,
    run,
)
from attnax.kernels._gpu.tile import Inputs, Kernel
from attnax.kernels._gpu.tile_lists import TileList
from attnax.kernels._gpu.tile_sizes import grid_of
from attnax.typing import Array

__all__ = ["backward", "decode", "forward"]

_DECODING_PROGRAMS = 264  # two for each multiprocessor of an H100
_TABLE_CHUNK = 4096  # the most elements whose gradient a program keeps in registers
_TABLE_PROGRAMS = 1024  # enough for any GPU; each program writes a share of the table


def forward(arrays: Arrays, setup: Setup, *, low: bool) -> tuple[Array, Array, Array | None]:
    """The attention of every query.

    Returns:
        out (B, N, T, V), lse (B, N, T) float32 in units of log 2, and if `low` the rounding error of out, in the same
        dtype.
    """
    query, _, value, _ = arrays
    spec, inputs = _prepare(arrays, setup)
    (batch, heads, seq_q, _), seq = spec.score_shape, inputs.query.shape[2]
    shapes: Shapes = {
        "out": ((batch, heads, seq, inputs.value.shape[-1]), jnp.float32 if setup.is_wide else query.dtype),
        "lse": ((batch, heads, seq), jnp.float32),
    }
    if low:
        shapes["low"] = shapes["out"]
    grid = spec.grid.num_q, heads, batch
    results = run("attnax_forward", partial(forward_kernel, spec, 1), spec, grid, inputs, shapes)
    out, *rest = (results[name][:, :, :seq_q, : value.shape[-1]] for name in ("out", "low")[: 1 + low])
    return out, results["lse"][:, :, :seq_q], rest[0] if low else None


def decode(arrays: Arrays, setup: Setup, pages: Array | None) -> tuple[Array, Array]:
    """(out, lse) in float32 of a few queries over many keys; states of parts of the keys are merged.

    Args:
        arrays: head sizes are powers of 2; with `pages`, key and value are pages (P, K, page, H).
        setup: the other arguments.
        pages: int32 (B, num_pages), the block table; None for keys in one piece.
    """
    spec, inputs = _prepare(arrays, setup, pages)
    # A test of all keys beforehand would take as long as the attention.
    inputs = inputs._replace(any_non_finite=None, finite=None)
    (batch, heads, seq_q, _), grid = spec.score_shape, spec.grid
    parts = _num_parts(batch * heads * grid.num_q, grid.num_kv)
    rows = batch, heads, parts, inputs.query.shape[2]
    shapes: Shapes = {"acc": ((*rows, inputs.value.shape[-1]), jnp.float32)}
    shapes |= dict.fromkeys(("max", "sum"), (rows, jnp.float32))
    programs = grid.num_q * parts, heads, batch
    results = run("attnax_decode", partial(forward_kernel, spec, parts), spec, programs, inputs, shapes)
    state = softmax.SoftmaxState(results["acc"], results["max"], results["sum"])
    while state.sum.shape[2] > 1:
        state = softmax.merge(*(jax.tree.map(lambda x, n=n: x[:, :, n::2], state) for n in (0, 1)))
    out, lse = softmax.finish(jax.tree.map(lambda x: x[:, :, 0, :seq_q], state))
    return out, lse


def _num_parts(programs: int, num_kv: int) -> int:
    """The number of parts of the keys, a power of 2, that gives every multiprocessor of a large GPU work."""
    parts = 1
    while programs * parts < _DECODING_PROGRAMS and 2 * parts <= num_kv:
        parts *= 2
    return parts


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
    query, key, value, _ = arrays
    rows = query_rows(query, key.shape[1], out, lse, d_out, d_lse)
    spec, inputs = _prepare(arrays, setup)
    batch, heads, seq_q, seq_kv = spec.score_shape
    length = inputs.query.shape[2]
    inputs = inputs._replace(
        any_non_finite=inputs.any_non_finite | rows.any_contaminated.astype(jnp.int32),
        d_out=_whole_rows(rows.d_out, length, 0),
        lse=_whole_rows(rows.lse, length, jnp.inf),
        delta=_whole_rows(rows.delta, length, 0),
    )
    kernel = Kernel(spec, inputs)
    query_shape, key_shape, value_shape = (x.shape for x in inputs[:3])
    shapes: Shapes = {"d_query": (query_shape, jnp.float32 if setup.learn_scale else query.dtype)}
    shapes |= {f"mod {n}": (query_shape[:3], jnp.float32) for n in kernel.learned("rows")}
    by_query = run(
        "attnax_d_query", partial(d_query_kernel, spec), spec, (spec.grid.num_q, heads, batch), inputs, shapes
    )
    shapes = {
        name: (padded, jnp.float32 if setup.is_wide else key.dtype)
        for name, padded in (("d_key", key_shape), ("d_value", value_shape))
    }
    shapes |= {f"mod {n}": ((batch, heads, key_shape[2]), jnp.float32) for n in kernel.learned("columns")}
    grid = spec.grid.num_kv, spec.kv_heads, batch
    by_key = run("attnax_d_key_value", partial(d_key_value_kernel, spec), spec, grid, inputs, shapes)
    d_query = by_query["d_query"][:, :, :seq_q, : query.shape[-1]]
    d_key = by_key["d_key"][:, :, :seq_kv, : key.shape[-1]]
    d_value = by_key["d_value"][:, :, :seq_kv, : value.shape[-1]]
    return d_query, d_key, d_value, _mod_gradients(spec, inputs, setup, {**by_query, **by_key})


def _mod_gradients(spec: KernelSpec, inputs: Inputs, setup: Setup, sums: dict[str, Array]) -> tuple[Array, ...]:
    """The gradients of the score mod's floating values, from sums over queries, keys and pairs."""
    if setup.score_mod is None:
        return ()
    kernel, captured = Kernel(spec, inputs), Captured(setup.score_mod, spec.score_shape, setup.positions)
    return captured.gradients(
        {n: sums[f"mod {n}"] for n in (*kernel.learned("rows"), *kernel.learned("columns"))},
        kernel.learned("tables"),
        partial(_table_gradient, spec, inputs, captured),
    )


def _table_gradient(spec: KernelSpec, inputs: Inputs, captured: Captured, n: int) -> Array:
    """The gradient of a table from one of its reads, for each slab."""
    read, (batch, heads, seq_q, seq_kv) = captured.split.reads[n], spec.score_shape
    if captured.how_to_learn(read) == "pairs":
        index = captured.split.index_in_bounds(read, captured.score_shape)
        outer = [x.shape for axis, x in enumerate(index) if axis not in read.axes and x is not None]
        slab = tuple(max((sizes[axis] for sizes in outer), default=1) for axis in (0, 1))
        grid = spec.grid.num_q * spec.grid.num_kv, slab[1], slab[0]
        shapes: Shapes = {"table": ((*slab, inputs.query.shape[2], inputs.key.shape[2]), jnp.float32)}
        total = run("attnax_d_pairs", partial(d_pairs_kernel, spec, n), spec, grid, inputs, shapes)["table"]
        total = total[:, :, :seq_q, :seq_kv]
        # The table may have keys before queries.
        return total if is_each(index[read.axes[0]], 2, seq_q) else total.swapaxes(2, 3)
    sizes = [read.shape[axis] for axis in read.axes]
    count = math.prod(sizes)
    size = min(_TABLE_CHUNK, _next_power_of_2(count))
    chunks = -(-count // size)
    groups = min(spec.grid.num_q, max(1, _TABLE_PROGRAMS // (batch * heads * chunks)))
    shapes = {"table": ((batch, heads, chunks, groups, size), jnp.float32)}
    grid = groups * chunks, heads, batch
    total = run("attnax_d_table", partial(d_table_kernel, spec, n), spec, grid, inputs, shapes)["table"]
    return total.sum(3).reshape(batch, heads, -1)[..., :count].reshape(batch, heads, *sizes)


def _prepare(arrays: Arrays, setup: Setup, pages: Array | None = None) -> tuple[KernelSpec, Inputs]:
    """The static and the array arguments of a kernel. Keys in pages are not tested for non-finite rows beforehand."""
    query, key, value, scale = arrays
    batch, heads, seq_q, _ = query.shape
    _, kv_heads, seq_kv, _ = key.shape
    if pages is not None:
        seq_kv *= pages.shape[1]
    score_shape, grid = (batch, heads, seq_q, seq_kv), grid_of(setup.tile, seq_q, seq_kv)
    lengths = max(seq_q, grid.block_q), max(seq_kv, grid.block_kv)
    mask, score_mod = (None if x is None else split(x) for x in (setup.mask, setup.score_mod))
    codes = tiles = turned = any_non_finite = finite = None
    if setup.mask is not None:
        is_opaque, positions = setup.is_opaque, setup.positions
        codes = tile_codes(grid, batch, heads, setup.bounds, setup.mask, is_opaque=is_opaque, positions=positions)
        codes = jnp.broadcast_to(codes, (*codes.shape[:2], grid.num_q, grid.num_kv))
        tiles, turned = TileList.of(codes), TileList.of(codes.swapaxes(2, 3))
    if pages is None:
        finite = is_finite(key) & is_finite(value)
        any_non_finite = (~finite.all(2)).astype(jnp.int32)
        # Not int8: Triton lays out a product by the narrowest number that its operands depend on.
        finite = _whole_rows(finite.astype(jnp.int32), lengths[1], "edge")
        key, value = _whole_rows(key, lengths[1], "edge"), _whole_rows(value, lengths[1], 0)

    positions = None
    if setup.positions is not None:
        q, kv = (
            jnp.pad(x, (0, length - x.size), mode="edge") for x, length in zip(setup.positions, lengths, strict=True)
        )
        positions = q, kv

    def operands(function: Lifted | None) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        if function is None:
            return (), ()
        cut, values = split(function), function.values
        whole = (_pad(x, lengths) for x in cut.compute_operands(values, score_shape, setup.positions))
        return tuple(map(_loadable, whole)), tuple(_loadable(values[read.table]) for read in cut.reads)

    inputs = Inputs(
        _whole_rows(query, lengths[0], "edge"),
        key,
        value,
        jnp.asarray(scale, jnp.float32).reshape(1),
        tiles,
        turned,
        codes,
        any_non_finite,
        finite,
        setup.words,
        *operands(setup.mask),
        *operands(setup.score_mod),
        block_table=pages,
        positions=positions,
    )
    spec = KernelSpec(
        score_shape, kv_heads, grid, setup.tile, mask, score_mod, setup.dropout_rate, setup.learn_scale, setup.interpret
    )
    return spec, inputs


def _whole_rows(x: Array, length: int, fill: Any) -> Array:
    """(B, N, L) or (B, N, L, H), padded to `length` rows by `fill`, or the last row, and to a power of 2 columns."""
    missing = ((0, 0), (0, 0), (0, length - x.shape[2]), *((0, 0),) * (x.ndim - 3))
    x = jnp.pad(x, missing, mode="edge") if fill == "edge" else jnp.pad(x, missing, constant_values=fill)
    return x if x.ndim == 3 else jnp.pad(x, [(0, 0)] * 3 + [(0, _power_of_2(x.shape[3]) - x.shape[3])])


def _power_of_2(size: int) -> int:
    """The least size that tensor cores take and that holds `size`."""
    return max(16, _next_power_of_2(size))


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _pad(x: Array, lengths: tuple[int, int]) -> Array:
    """An operand (B', N', T|1, S|1), padded to `lengths` by its last elements."""
    missing = [max(0, length - size) if size > 1 else 0 for length, size in zip(lengths, x.shape[2:], strict=True)]
    return jnp.pad(x, ((0, 0), (0, 0), *((0, n) for n in missing)), mode="edge") if any(missing) else x


def _loadable(x: Array) -> Array:
    """Kernels load no booleans."""
    return x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
