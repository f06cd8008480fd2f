"""A user's function of (batch, head, query, key) as straight-line code that runs on indices of any shape.

A kernel cannot call Python, index an array in registers, or use arrays from outside. `split` cuts a traced function
into parts that a kernel can run. Values that depend on captured arrays and on a query or a key alone are computed
before the kernel, for all queries and keys, and become operands. An index into a captured array by query and key
together becomes a load. Other operations must be elementwise, or they are refused by name. Values keep their natural
shapes (see `_core/natural.py`), so one code serves tiles of any size, transposed or not, and whole arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from attnax.checks import wide_dtype
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.natural import (
    SHAPE,
    Bind,
    align,
    evaluate,
    no_table,
    run_varying,
    why_not_natural,
)
from attnax.kernels._core.programs import Program, dtype_of, needed_for, shape_of
from attnax.typing import Array

__all__ = ["Read", "Split", "add_slabs", "bind_in_float32", "split", "why_not_split"]

_NARROW = jnp.float16, jnp.bfloat16
_CASTS = "bitcast_convert_type", "convert_element_type"  # whose parameters name the dtype of the result


class Read(NamedTuple):
    """A read of a captured array by query and key together, inside of the kernel."""

    table: int  # the number of the captured value
    equation: JaxprEqn
    axes: tuple[int, ...]  # of the table, whose index depends on query or key (or on the score)
    by_score: bool  # whether the index depends on the score
    shape: tuple[int, ...]  # of the table
    dtype: Any


Load = Callable[[Read, list[Array]], Array]
"""The elements of a read at one index for each axis of its table, all in bounds."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A traced function cut in two.

    Attributes:
        program: the whole.
        before: the equations that run before the kernel.
        inside: the equations that run in the kernel.
        operands: results of `before`, and captured values, that `inside` takes.
        reads: the reads in `inside`.
    """

    program: Program
    before: tuple[JaxprEqn, ...]
    inside: tuple[JaxprEqn, ...]
    operands: tuple[Var, ...]
    reads: tuple[Read, ...]

    @property
    def pair_bytes(self) -> int:
        """Bytes of shared memory for the elements loaded for each pair: a copy takes at least 4 bytes."""
        return sum(max(4, read.dtype.itemsize) for read in self.reads)

    def compute_operands(
        self,
        values: Sequence[Array],
        score_shape: tuple[int, int, int, int],
        positions: tuple[Array, Array] | None = None,
    ) -> tuple[Array, ...]:
        """The operands for all of `score_shape`, each (B|1, N|1, T|1, S|1); differentiable in `values`.

        `positions` (T,) and (S,) are the indices of queries and keys, by default 0, 1, and so on.
        """
        indices = [lax.broadcasted_iota(jnp.int32, _only(axis, size), axis) for axis, size in enumerate(score_shape)]
        if positions is not None:
            indices[2:] = positions[0][None, None, :, None], positions[1][None, None, None]
        env: dict[Any, Any] = dict(zip(self.program.captured, values, strict=True))
        env.update(zip(self._indices, indices, strict=True))
        self._evaluate(self.before, env, lambda eqn, index: _take(env[eqn.invars[0]], tuple(index)))
        results = (env[var] for var in self.operands)
        return tuple(x.reshape((1,) * (4 - jnp.ndim(x)) + jnp.shape(x)) for x in results)

    def __call__(self, operands: Sequence[Any], load: Load, *arguments: Any, bind: Bind) -> Any:
        """The function's result for (scores, b, h, q, kv), or (b, h, q, kv), from the operands at these indices.

        `bind` runs an elementwise equation as the kernel's backend can.
        """
        env: dict[Any, Any] = dict(zip(self.operands, operands, strict=True))
        env.update(zip(self.program.arguments, arguments, strict=True))
        reads = {id(read.equation): read for read in self.reads}
        self._evaluate(self.inside, env, lambda eqn, index: load(reads[id(eqn)], index), bind)
        return self._result(env)

    def _evaluate(
        self, equations: Sequence[JaxprEqn], env: dict[Any, Any], load: Callable[..., Array], bind: Bind | None = None
    ) -> None:
        gather = partial(_gather, load=load)
        evaluate(equations, env, self.program.rules, gather, bind or bind_in_float32)

    def _result(self, env: dict[Any, Any]) -> Array:
        (result,) = self.program.results
        return jnp.asarray(result.val if isinstance(result, Literal) else env[result], dtype_of(result))

    @property
    def _indices(self) -> tuple[Var, ...]:
        return self.program.arguments[-4:]

    def index_of(self, read: Read, score_shape: tuple[int, int, int, int]) -> list[np.ndarray | None]:
        """The index of a read along each axis of its table, in natural shapes; None for an index that is not simple.

        A simple index depends on no captured value, and not on query and key together.
        """
        # Inside of a shard_map under `jax.set_mesh` JAX computes nothing at once.
        nowhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
        with nowhere, jax.ensure_compile_time_eval():
            env: dict[Any, Any] = {
                var: jnp.arange(size, dtype=jnp.int32).reshape(_only(axis, size))
                for axis, (var, size) in enumerate(zip(self._indices, score_shape, strict=True))
            }
            simple = {var: frozenset((name,)) for var, name in zip(self._indices, "bhqk", strict=True)}
            for eqn in self.inside:
                if eqn is read.equation:
                    break
                if eqn.primitive.name == "concatenate":
                    env[eqn.outvars[0]] = tuple(
                        jnp.asarray(var.val) if isinstance(var, Literal) else env.get(var) for var in eqn.invars
                    )
                elif all(isinstance(var, Literal) or var in simple for var in eqn.invars):
                    mine = frozenset().union(*(simple[var] for var in eqn.invars if isinstance(var, Var)))
                    if eqn.primitive.name in SHAPE or not {"q", "k"} <= mine:
                        self._evaluate((eqn,), env, no_table)
                        simple.update(dict.fromkeys(eqn.outvars, mine))
            parts = _by_axis(read.equation, env.get(read.equation.invars[1]))
            return [None if part is None else np.asarray(part).reshape(np.shape(part) or (1,) * 4) for part in parts]

    def index_in_bounds(self, read: Read, score_shape: tuple[int, int, int, int]) -> list[np.ndarray | None]:
        """`index_of`, as JAX clamps it."""
        found = self.index_of(read, score_shape)
        return [x if x is None else np.clip(x, 0, size - 1) for x, size in zip(found, read.shape, strict=True)]


def split(lifted: Lifted) -> Split:
    """The split of a mask or score mod that `why_not_split` accepts, made once and kept with the program."""
    program = lifted.program
    if "split" not in program.found:
        program.found["split"] = _split(program)
    found: Split = program.found["split"]
    return found


def why_not_split(lifted: Lifted, elementwise: frozenset[str]) -> str | None:
    """The reason why no kernel with these elementwise primitives can hold a mask or score mod, or None."""
    if lifted.refusal is not None:
        return lifted.refusal
    known = lifted.program.found.setdefault("why not", {})
    if elementwise not in known:
        known[elementwise] = why_not_natural(lifted.program, elementwise)
    reason: str | None = known[elementwise]
    return reason


def _split(program: Program) -> Split:
    names = ("scores", "b", "h", "q", "kv")[-len(program.arguments) :]
    depends = {var: frozenset((name,)) for var, name in zip(program.arguments, names, strict=True)}
    depends.update({var: frozenset(("captured",)) for var in program.captured})
    inside: list[JaxprEqn] = []
    for eqn in program.equations:
        inputs = [depends[var] for var in eqn.invars if isinstance(var, Var)]
        mine = frozenset().union(*inputs)
        depends.update(dict.fromkeys(eqn.outvars, mine))
        of_pairs = "scores" in mine or {"q", "kv"} <= mine
        if of_pairs or "captured" not in mine:  # without captured arrays it is cheap to compute in the kernel
            inside.append(eqn)
    made_inside = {var for eqn in inside for var in eqn.outvars} | set(program.arguments)
    wanted: dict[Var, None] = {}
    reads = []
    for eqn in inside:
        sources = list(eqn.invars)
        if eqn.primitive.name == "gather":
            table, index = eqn.invars
            sources = [index]
            by_score = isinstance(index, Var) and "scores" in depends[index]
            axes = _moving_axes(eqn, inside, depends)
            table_at = program.captured.index(table)
            reads.append(Read(table_at, eqn, axes, by_score, shape_of(table), dtype_of(table)))
        wanted.update(dict.fromkeys(var for var in sources if isinstance(var, Var) and var not in made_inside))
    wanted.update(dict.fromkeys(v for v in program.results if isinstance(v, Var) and v not in made_inside))
    return Split(program, tuple(needed_for(program.equations, wanted)), tuple(inside), tuple(wanted), tuple(reads))


def _moving_axes(eqn: JaxprEqn, equations: list[JaxprEqn], depends: dict[Var, frozenset[str]]) -> tuple[int, ...]:
    """Axes of a gather's table whose index varies within a tile."""
    parts: list[Any] = [eqn.invars[1]]
    made_by = {var: other for other in equations for var in other.outvars}
    made = made_by.get(parts[0])
    if made is not None and made.primitive.name == "concatenate":
        parts = list(made.invars)
    moving = [isinstance(part, Var) and bool(depends[part] & {"q", "kv", "scores"}) for part in parts]
    axes = eqn.params["dimension_numbers"].start_index_map
    return tuple(sorted(axis for axis, moves in zip(axes, moving, strict=True) if moves))


def bind_in_float32(eqn: JaxprEqn, values: list[Any]) -> Array:
    """The result of an elementwise equation, whose 16-bit floats are computed in float32."""
    dtype, values = dtype_of(eqn.outvars[0]), align(eqn, values)
    if dtype not in _NARROW or eqn.primitive.name in _CASTS:
        return run_varying(eqn, values)
    return run_varying(
        eqn, [jnp.asarray(x, jnp.float32) if jnp.result_type(x) in _NARROW else x for x in values]
    ).astype(dtype)


def _by_axis(eqn: JaxprEqn, index: Any) -> list[Any]:
    """One index for each axis of a gather's table."""
    parts = index if isinstance(index, tuple) else (index,)
    by_axis = dict(zip(eqn.params["dimension_numbers"].start_index_map, parts, strict=True))
    return [by_axis.get(axis, jnp.int32(0)) for axis in range(len(shape_of(eqn.invars[0])))]


def _gather(eqn: JaxprEqn, index: Any, *, load: Callable[[JaxprEqn, list[Array]], Array]) -> Array:
    shape = shape_of(eqn.invars[0])
    parts = _by_axis(eqn, index)
    inside = [(part >= 0) & (part < size) for part, size in zip(parts, shape, strict=True)]
    safe = [jnp.clip(part, 0, size - 1) for part, size in zip(parts, shape, strict=True)]
    value = load(eqn, safe)
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return value
    fill, dtype = eqn.params["fill_value"], value.dtype
    if fill is None:
        fill = jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else _integer_fill(dtype)
    everywhere = inside[0]
    for more in inside[1:]:
        everywhere = everywhere & more
    if dtype == jnp.bool_:  # a TPU's kernels have no select of booleans
        return value | ~everywhere if fill else value & everywhere
    return jnp.where(everywhere, value, jnp.asarray(fill, dtype))


def _integer_fill(dtype: Any) -> Any:
    if dtype == jnp.bool_:
        return True
    return jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.iinfo(dtype).min


def _only(axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if axis == other else 1 for other in range(4))


@jax.custom_vjp
def _take(table: Array, index: tuple[Array, ...]) -> Array:
    """`table[index]`, with a gradient that is summed in the same order every time."""
    return table.at[index].get(mode="promise_in_bounds")


def _take_forward(table: Array, index: tuple[Array, ...]) -> tuple[Array, Any]:
    return _take(table, index), (table, index)


def _take_backward(residuals: Any, cotangent: Array) -> tuple[Array, None]:
    table, index = residuals
    index = jnp.broadcast_arrays(*index)
    flat = jnp.ravel_multi_index(tuple(x.reshape(-1) for x in index), table.shape, mode="clip")
    sums = _segment_sums(cotangent.reshape(-1), flat, table.size)
    return sums.reshape(table.shape).astype(table.dtype), None


_take.defvjp(_take_forward, _take_backward)


def _segment_sums(values: Array, segments: Array, count: int) -> Array:
    """(count,) sums in float32 at least of the values of each segment; no atomics, whose order is random."""
    dtype = wide_dtype(values.dtype)
    order = jnp.argsort(segments, stable=True)
    values, segments = values[order].astype(dtype), segments[order]
    change = segments[1:] != segments[:-1]
    begins = jnp.concatenate([jnp.ones(1, bool), change])

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, running = lax.associative_scan(join, (begins, values))
    last = jnp.concatenate([change, jnp.ones(1, bool)])
    target = jnp.where(last, segments, count)
    return jnp.zeros(count, dtype).at[target].set(running, mode="drop")


def add_slabs(shape: tuple[int, ...], axes: tuple[int, ...], slabs: Array, index: Sequence[np.ndarray | None]) -> Array:
    """A table of `shape`: the sum of slabs, each at its place, added in order.

    Args:
        shape: of the table.
        axes: of the table, over which slabs extend, from their first element on.
        slabs: (B', N', *sizes along `axes`).
        index: for each axis of the table, in `axes` or not, its index at (B'|1, N'|1, 1, 1).
    """
    rows, heads = slabs.shape[:2]
    starts = [
        jnp.zeros(rows * heads, jnp.int32)
        if axis in axes
        else jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows, heads, 1, 1)).reshape(-1)
        for axis, x in enumerate(index)
    ]
    sizes = iter(slabs.shape[2:])
    block = tuple(next(sizes) if axis in axes else 1 for axis in range(len(shape)))

    def add(total: Array, part: tuple[Array, list[Array]]) -> tuple[Array, None]:
        slab, start = part
        old = lax.dynamic_slice(total, start, block)
        return lax.dynamic_update_slice(total, old + slab.reshape(block), start), None

    nothing = vary(jnp.zeros(shape, slabs.dtype), varying_axes(slabs))
    total, _ = lax.scan(add, nothing, (slabs.reshape(rows * heads, *slabs.shape[2:]), starts))
    return total
