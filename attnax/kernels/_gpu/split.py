"""A user's function of (batch, head, query, key) as straight-line code that runs on indices of any shape.

A kernel cannot call Python, index an array that it holds, or use arrays from outside. `split` turns a traced function
into what it can do: parts that depend on captured arrays and on a query or a key alone are computed before the kernel,
for all queries and keys, and become its operands; an index into a captured array by query and key together becomes a
load; the rest is elementwise. Anything else is refused by name. Values keep their natural shapes, those to which the
indices that they depend on broadcast, so the same code serves tiles of any size, turned or not, and whole arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from attnax.checks import apply_score_mod, wide_dtype
from attnax.kernels._core.lift import Lifted, flatten, lift, needed_for, spread, trace_rule
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.pairs import ELEMENTWISE
from attnax.masks import Mask
from attnax.typing import Array, ScoreMod

__all__ = ["Read", "Split", "add_slabs", "lift_mask", "lift_score_mod", "reads_pairs", "split", "why_not_split"]

# Sizes that no real axis has: they tell queries from keys in the shapes of a traced function.
_QUERIES, _KEYS = 1009, 1013

# These change neither the values nor their natural shape.
_SHAPE = frozenset(("broadcast_in_dim", "expand_dims", "pcast", "pvary", "reshape", "reshard", "squeeze"))

_NARROW = jnp.float16, jnp.bfloat16
_CASTS = "bitcast_convert_type", "convert_element_type"  # whose parameters name the dtype of the result
_CUSTOM = "custom_jvp_call"


class RefusedError(NotImplementedError):
    """The function does what no kernel can; the message says what."""


def lift_mask(mask: Mask, axes: frozenset[str]) -> Lifted:
    """A mask for `split`; `axes` are the mesh axes that arguments vary over."""
    return lift(mask, *_example_indices(axes))


def lift_score_mod(caller: str, score_mod: ScoreMod, axes: frozenset[str]) -> Lifted:
    """A score mod for `split`."""

    def modify(scores: Array, *indices: Array) -> Array:
        return apply_score_mod(caller, score_mod, scores, *indices)

    return lift(modify, _example((1, 1, _QUERIES, _KEYS), jnp.float32, axes), *_example_indices(axes))


def _example_indices(axes: frozenset[str]) -> tuple[Any, ...]:
    shapes = (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, _QUERIES, 1), (1, 1, 1, _KEYS)
    return tuple(_example(shape, jnp.int32, axes) for shape in shapes)


def _example(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> Any:
    return vary(jnp.zeros(shape, dtype), axes) if axes else jax.ShapeDtypeStruct(shape, dtype)


class Read(NamedTuple):
    """An element of a captured array by query and key together, inside of the kernel."""

    table: int  # which of the captured values
    equation: JaxprEqn
    axes: tuple[int, ...]  # of the table, those whose index depends on query or key (or on the score)
    by_score: bool  # whether the index depends on the score
    shape: tuple[int, ...]  # of the table
    dtype: Any


Load = Callable[[Read, list[Array]], Array]
"""The elements of a read at one index for each axis of its table, all in bounds."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A traced function cut in two.

    Attributes:
        lifted: the whole.
        before: its equations that are run before the kernel.
        inside: and those that are run in it.
        operands: what the second part takes from the first, or from the captured values.
        reads: what the second part loads.
    """

    lifted: Lifted
    before: tuple[JaxprEqn, ...]
    inside: tuple[JaxprEqn, ...]
    operands: tuple[Var, ...]
    reads: tuple[Read, ...]

    @property
    def pair_bytes(self) -> int:
        """Bytes of shared memory that what is loaded for each pair takes: copies into it are of 4 bytes at least."""
        return sum(max(4, read.dtype.itemsize) for read in self.reads)

    def compute_operands(
        self,
        values: Sequence[Array],
        full: tuple[int, int, int, int],
        positions: tuple[Array, Array] | None = None,
    ) -> tuple[Array, ...]:
        """The operands for all of (B, N, T, S) = `full`, each (B|1, N|1, T|1, S|1); differentiable in `values`.

        `positions` (T,) and (S,) are the indices of queries and keys, by default 0, 1, and so on.
        """
        indices = [lax.broadcasted_iota(jnp.int32, _only(axis, size), axis) for axis, size in enumerate(full)]
        if positions is not None:
            indices[2:] = positions[0][None, None, :, None], positions[1][None, None, None]
        env: dict[Any, Any] = dict(zip(self.lifted.program.captured, values, strict=True))
        env.update(zip(self._indices, indices, strict=True))
        _evaluate(self.before, env, lambda eqn, index: _take(env[eqn.invars[0]], tuple(index)))
        results = (env[var] for var in self.operands)
        return tuple(x.reshape((1,) * (4 - jnp.ndim(x)) + jnp.shape(x)) for x in results)

    def __call__(self, operands: Sequence[Any], load: Load, *arguments: Any) -> Any:
        """The function's result for (scores, b, h, q, kv), or (b, h, q, kv), given the operands cut to them."""
        env: dict[Any, Any] = dict(zip(self.operands, operands, strict=True))
        env.update(zip(self.lifted.program.arguments, arguments, strict=True))
        reads = {id(read.equation): read for read in self.reads}
        _evaluate(self.inside, env, lambda eqn, index: load(reads[id(eqn)], index))
        return self._result(env)

    def everywhere(self, values: Sequence[Array], *arguments: Array) -> Array:
        """The function's result for arguments of any shapes that broadcast, outside of a kernel."""
        program = self.lifted.program
        env: dict[Any, Any] = dict(zip((*program.captured, *program.arguments), (*values, *arguments), strict=True))
        _evaluate(program.equations, env, lambda eqn, index: _take(env[eqn.invars[0]], tuple(index)))
        return self._result(env)

    def _result(self, env: dict[Any, Any]) -> Array:
        (result,) = self.lifted.program.results
        return jnp.asarray(result.val if isinstance(result, Literal) else env[result], result.aval.dtype)

    @property
    def _indices(self) -> tuple[Var, ...]:
        return self.lifted.program.arguments[-4:]

    def index_of(self, read: Read, full: tuple[int, int, int, int]) -> list[np.ndarray | None]:
        """For each axis of a read's table its index at all of `full`, in natural shapes; None if it is not that simple.

        Simple is what depends on no captured value and not on query and key together.
        """
        with jax.ensure_compile_time_eval():
            env: dict[Any, Any] = {
                var: jnp.arange(size, dtype=jnp.int32).reshape(_only(axis, size))
                for axis, (var, size) in enumerate(zip(self._indices, full, strict=True))
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
                    if eqn.primitive.name in _SHAPE or not {"q", "k"} <= mine:
                        _evaluate((eqn,), env, _no_load)
                        simple.update(dict.fromkeys(eqn.outvars, mine))
            parts = _by_axis(read.equation, env.get(read.equation.invars[1]))
            return [None if part is None else np.asarray(part).reshape(np.shape(part) or (1,) * 4) for part in parts]


def split(lifted: Lifted) -> Split:
    """How `lifted`, from `lift_mask` or `lift_score_mod`, runs inside of a kernel.

    Raises:
        RefusedError: it cannot.
    """
    program = lifted.program
    names = ("scores", "b", "h", "q", "kv")[-len(program.arguments) :]
    depends = {var: frozenset((name,)) for var, name in zip(program.arguments, names, strict=True)}
    depends.update({var: frozenset(("captured",)) for var in program.captured})
    captured = set(program.captured)
    inside: list[JaxprEqn] = []
    for eqn in program.equations:
        _check(eqn, captured)
        inputs = [depends[var] for var in eqn.invars if isinstance(var, Var)]
        mine = frozenset().union(*inputs)
        depends.update(dict.fromkeys(eqn.outvars, mine))
        of_pairs = "scores" in mine or {"q", "kv"} <= mine
        if of_pairs or "captured" not in mine:  # what needs no captured array is cheap where it is used
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
            axes, kind = _moving_axes(eqn, inside, depends), _kind(table)
            reads.append(Read(program.captured.index(table), eqn, axes, by_score, *kind))
        wanted.update(dict.fromkeys(var for var in sources if isinstance(var, Var) and var not in made_inside))
    wanted.update(dict.fromkeys(v for v in program.results if isinstance(v, Var) and v not in made_inside))
    for var in wanted:
        if var in captured and math.prod(_kind(var)[0]) != 1:
            raise RefusedError(
                f"it uses a captured array of shape {_kind(var)[0]} as a whole; index it by b, h, q and kv"
            )
    return Split(lifted, tuple(needed_for(program.equations, wanted)), tuple(inside), tuple(wanted), tuple(reads))


def reads_pairs(lifted: Lifted) -> bool:
    """Whether it can be split, and then loads something for each pair of a query and a key."""
    has_reads = any(eqn.primitive.name == "gather" for eqn in lifted.program.equations)
    return has_reads and why_not_split(lifted) is None and bool(split(lifted).reads)


def why_not_split(lifted: Lifted) -> str | None:
    """What no kernel can do of `lifted`; None if it can be split."""
    try:
        split(lifted)
    except RefusedError as refusal:
        return str(refusal)
    return None


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


def _check(eqn: JaxprEqn, captured: set[Var]) -> None:
    """Raises RefusedError for an equation that no kernel can run."""
    name = eqn.primitive.name
    shapes = [_kind(var)[0] for var in (*eqn.invars, *eqn.outvars)]
    if name == "gather":
        _check_gather(eqn, captured)
    elif name == "concatenate":
        last = len(shapes[-1]) - 1
        if eqn.params["dimension"] != last or any(shape[-1] != 1 for shape in shapes[:-1]):
            raise RefusedError("concatenate")
    elif name == _CUSTOM:
        for program in _call_and_rule(eqn):
            for inner in program.jaxpr.eqns:
                _check(inner, set())
    elif name in _SHAPE:
        if _marks(shapes[0]) != [mark for mark in _marks(shapes[-1]) if mark in _marks(shapes[0])]:
            raise RefusedError(f"{name} to shape {shapes[-1]}")
    elif name not in ELEMENTWISE:
        raise RefusedError(name)
    if any(isinstance(var, Var) and jnp.issubdtype(_kind(var)[1], jnp.complexfloating) for var in eqn.outvars):
        raise RefusedError("complex numbers")
    for var in eqn.outvars:
        odd = [size for size in _kind(var)[0] if size not in (1, _QUERIES, _KEYS)]
        if odd and name != "concatenate":
            raise RefusedError(f"{name} with an axis of size {odd[0]}")


def _check_gather(eqn: JaxprEqn, captured: set[Var]) -> None:
    table, _ = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    shape, _ = _kind(table)
    whole = tuple(range(len(shape)))
    if not isinstance(table, Var) or table not in captured:
        raise RefusedError("gather of computed values")
    if numbers.operand_batching_dims or numbers.offset_dims or numbers.collapsed_slice_dims != whole:
        raise RefusedError(f"gather of slices; index all {len(shape)} axes of the captured array")
    left = set(whole) - set(numbers.start_index_map)
    if any(shape[axis] != 1 for axis in left):
        raise RefusedError(f"gather of slices; index all {len(shape)} axes of the captured array")
    if eqn.params["mode"] not in (
        lax.GatherScatterMode.CLIP,
        lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        lax.GatherScatterMode.FILL_OR_DROP,
    ):
        raise RefusedError(f"gather in mode {eqn.params['mode']}")


def _kind(var: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype."""
    return tuple(var.aval.shape), var.aval.dtype


def _marks(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _evaluate(
    equations: Sequence[JaxprEqn], env: dict[Any, Any], load: Callable[[JaxprEqn, list[Array]], Array]
) -> None:
    """Runs equations on values of natural shapes; those joined by `concatenate`, an index, stay a tuple."""

    def read(var: Any) -> Any:
        return jnp.asarray(var.val, _kind(var)[1]) if isinstance(var, Literal) else env[var]

    for eqn in equations:
        name = eqn.primitive.name
        if name == "gather":
            env[eqn.outvars[0]] = _gather(eqn, read(eqn.invars[1]), load)
        elif name == "concatenate":
            env[eqn.outvars[0]] = tuple(map(read, eqn.invars))
        elif name == _CUSTOM:
            env.update(zip(eqn.outvars, _call_with_rule(eqn, [read(var) for var in eqn.invars]), strict=True))
        elif name in _SHAPE:
            value = read(eqn.invars[0])
            # A captured array of one element may have any number of axes.
            env[eqn.outvars[0]] = value.reshape(()) if jnp.size(value) == 1 else value
        else:
            values = [read(var) for var in eqn.invars]
            values = [x.reshape(()) if jnp.size(x) == 1 and jnp.ndim(x) else x for x in values]
            shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in values))
            values = [x if jnp.shape(x) == shape else spread(x, shape) for x in map(_rank(shape), values)]
            axes = frozenset().union(*map(varying_axes, values))
            values = [vary(x, axes) for x in values]
            env[eqn.outvars[0]] = _bind(eqn, values)


def _bind(eqn: JaxprEqn, values: list[Array]) -> Array:
    """The result of an elementwise equation. Triton divides no 16-bit floats and has no functions of them."""
    dtype = _kind(eqn.outvars[0])[1]
    if dtype not in _NARROW or eqn.primitive.name in _CASTS:
        return eqn.primitive.bind(*values, **eqn.params)
    wide = (x.astype(jnp.float32) if x.dtype in _NARROW else x for x in values)
    return eqn.primitive.bind(*wide, **eqn.params).astype(dtype)


def _call_and_rule(eqn: JaxprEqn) -> tuple[Any, Any]:
    """The programs of a function with a derivative of its own: its result, and the result's tangent."""
    programs = flatten(eqn.params["call_jaxpr"], rules=True), trace_rule(eqn)
    if any(program.consts for program in programs):
        raise RefusedError(f"{eqn.primitive.name} with arrays of its own")
    return programs


def _call_with_rule(eqn: JaxprEqn, values: Sequence[Array]) -> Sequence[Array]:
    """The results of such a function, which keeps its derivative."""
    of_call, of_rule = _call_and_rule(eqn)

    def evaluate(program: Any, *values: Array) -> list[Array]:
        env: dict[Any, Any] = dict(zip(program.jaxpr.invars, values, strict=True))
        _evaluate(program.jaxpr.eqns, env, _no_load)
        return [jnp.asarray(x.val if isinstance(x, Literal) else env[x], x.aval.dtype) for x in program.jaxpr.outvars]

    @jax.custom_jvp
    def call(*values: Array) -> list[Array]:
        return evaluate(of_call, *values)

    @call.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[list[Array], list[Array]]:
        moving = (t for x, t in zip(primals, tangents, strict=True) if jnp.issubdtype(x.dtype, jnp.floating))
        results = call(*primals)
        changes = evaluate(of_rule, *primals, *moving)
        return results, [jnp.broadcast_to(d, x.shape) for d, x in zip(changes, results, strict=True)]

    return call(*values)


def _rank(shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Scalars as they are, other values with as many axes as `shape`, which they have anyway."""
    return lambda x: x if jnp.ndim(x) in (0, len(shape)) else x.reshape((1,) * (len(shape) - x.ndim) + x.shape)


def _no_load(eqn: JaxprEqn, index: list[Array]) -> Array:
    raise AssertionError(f"{eqn.primitive.name} needs a table")


def _by_axis(eqn: JaxprEqn, index: Any) -> list[Any]:
    """One index for each axis of a gather's table."""
    parts = index if isinstance(index, tuple) else (index,)
    by_axis = dict(zip(eqn.params["dimension_numbers"].start_index_map, parts, strict=True))
    return [by_axis.get(axis, jnp.int32(0)) for axis in range(len(_kind(eqn.invars[0])[0]))]


def _gather(eqn: JaxprEqn, index: Any, load: Callable[[JaxprEqn, list[Array]], Array]) -> Array:
    shape, _ = _kind(eqn.invars[0])
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
    """(count,) sums in float32 at least of the values of each segment; no atomics, whose order is left to chance."""
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
    """A table of `shape` with each slab added where it belongs, one after the other.

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
