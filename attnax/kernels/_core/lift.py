"""Lifting: a user's function of tile indices, with the arrays that it captures as operands that get gradients.

A score mod or mask may close over arrays: parameters, document ids, values of an enclosing `grad`, `vmap` or
`shard_map`. A hand-written backward pass sees only its operands, so `lift` traces the function once, computes what
depends on nothing but captured arrays there and then, under ordinary differentiation, and keeps the rest as a program
that is run tile by tile on the values cut through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from attnax.checks import wide_dtype
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.pytrees import is_own, pytree_dataclass
from attnax.typing import Array

__all__ = [
    "Deferred",
    "Lifted",
    "defer",
    "expansion_of",
    "flatten",
    "is_own",
    "lift",
    "needed_for",
    "spread",
    "sum_in_float32",
    "trace_rule",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Straight-line code on (captured values, arguments).

    Programs of the same structure are equal, so that a rebuilt lambda compiles nothing new.
    """

    captured: tuple[Var, ...]
    arguments: tuple[Var, ...]
    equations: tuple[JaxprEqn, ...]
    results: tuple[Any, ...]
    structure: Hashable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.structure == other.structure

    def __hash__(self) -> int:
        return hash(self.structure)


@pytree_dataclass
class Lifted:
    """A traced function and the values that it captured; called with arrays of the shapes that it was traced at.

    Attributes:
        values: what was captured, as far as tiles need it.
        program: what is run for each tile.
    """

    values: tuple[Array, ...]
    program: Program = dataclasses.field(metadata={"static": True})

    def __call__(self, *arguments: Array) -> Any:
        """The function's result: one array, or a tuple of several."""
        return self._run(self.values, arguments, {})

    @property
    def floats(self) -> tuple[Array, ...]:
        """The values that get gradients."""
        return tuple(x for x in self.values if _is_float(x))

    def gradients(self) -> tuple[Array, ...]:
        """Zeros to accumulate the gradients of `floats` in, at least float32: a sum of many tiles needs it."""
        return tuple(vary(jnp.zeros(x.shape, wide_dtype(x.dtype)), varying_axes(x)) for x in self.floats)

    def finish(self, gradients: Sequence[Array]) -> tuple[Array, ...]:
        """The accumulated gradients in the dtypes of `floats`."""
        return tuple(total.astype(x.dtype) for total, x in zip(gradients, self.floats, strict=True))

    def differentiate(self, scores: Array, *indices: Array) -> tuple[Array, Callable[..., Any]]:
        """The result for arguments (scores, *indices), and its pullback.

        The pullback takes the result's cotangent and the gradients accumulated so far, and returns those of the scores
        and the gradients with this tile's share added. Where the function reads a captured array by index, that share
        is scattered into the accumulator; an array as large as all the scores costs a tile what the tile reads.
        """
        arguments = (scores, *indices)
        reads = self._reads(arguments)
        read_outside = {
            var for eqn in self.program.equations if id(eqn) not in reads for var in eqn.invars if isinstance(var, Var)
        } | {var for var in self.program.results if isinstance(var, Var)}
        floats = [i for i, x in enumerate(self.values) if _is_float(x)]
        direct = [i for i in floats if self.program.captured[i] in read_outside]

        def run(scores: Array, given: list[Array], read: list[Array]) -> Array:
            values = list(self.values)
            for i, x in zip(direct, given, strict=True):
                values[i] = x
            return self._run(values, (scores, *indices), dict(zip(reads, read, strict=True)))

        result, pull = jax.vjp(run, scores, [self.values[i] for i in direct], [x for x, _, _, _ in reads.values()])

        def pullback(cotangent: Array, gradients: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
            d_scores, d_direct, d_read = pull(cotangent)
            sums = dict(zip(floats, gradients, strict=True))
            for i, share in zip(direct, d_direct, strict=True):
                sums[i] = sums[i] + share.astype(sums[i].dtype)
            for (_, captured, eqn, where), share in zip(reads.values(), d_read, strict=True):
                if captured in sums:
                    sums[captured] = _add_where_read(sums[captured], eqn, where, share)
            return d_scores, tuple(sums[i] for i in floats)

        return result, pullback

    def _reads(self, arguments: tuple[Array, ...]) -> dict[int, tuple[Array, int, JaxprEqn, list[Any]]]:
        """By equation: reads of a floating captured array at indices that do not depend on the scores."""
        program, reads = self.program, {}
        position = {var: i for i, var in enumerate(program.captured) if _is_float(self.values[i])}
        tainted = {program.arguments[0]}
        env = dict(zip((*program.captured, *program.arguments), (*self.values, *arguments), strict=True))
        for eqn in program.equations:
            if any(isinstance(var, Var) and var in tainted for var in eqn.invars) or eqn.effects:
                tainted.update(eqn.outvars)
                continue
            _step(eqn, env)
            source = eqn.invars[0] if eqn.primitive.name in ("gather", "dynamic_slice") else None
            if isinstance(source, Var) and source in position:
                where = [_read(env, var) for var in eqn.invars[1:]]
                reads[id(eqn)] = env[eqn.outvars[0]], position[source], eqn, where
        return reads

    def _run(self, values: Sequence[Array], arguments: tuple[Array, ...], known: dict[int, Array]) -> Any:
        program = self.program
        env = dict(zip((*program.captured, *program.arguments), (*values, *arguments), strict=True))
        for eqn in program.equations:
            if id(eqn) in known:
                env[eqn.outvars[0]] = known[id(eqn)]
            else:
                _step(eqn, env)
        results = tuple(jnp.asarray(_read(env, var), var.aval.dtype) for var in program.results)
        return results[0] if len(results) == 1 else results


def lift(function: Callable[..., Any], *arguments: Any) -> Lifted:
    """`function` traced at the shapes, dtypes and varying axes of `arguments`, without what it captures.

    Args:
        function: takes arrays like `arguments`, returns an array or a tuple of arrays.
        arguments: arrays, or their shapes as `jax.ShapeDtypeStruct`; values do not matter.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    # Calls are inlined so that what they do with captured arrays alone is seen.
    flat = jax.make_jaxpr(lambda captured, *rest: inline(traced.jaxpr, captured, rest))(traced.consts, *arguments)
    count = len(traced.consts)
    inner = flat.jaxpr.invars[count:]
    known = dict(zip((*flat.jaxpr.constvars, *flat.jaxpr.invars[:count]), (*flat.consts, *traced.consts), strict=True))
    constant: dict[Var, JaxprEqn] = {}  # from literals alone: cheap to repeat, large to keep
    rest = []
    for eqn in flat.jaxpr.eqns:
        variables = [var for var in eqn.invars if isinstance(var, Var)]
        if eqn.effects or not all(var in known or var in constant for var in variables):
            rest.append(_anywhere(eqn))
        elif any(var in known for var in variables):
            _step(eqn, known, constant)
        else:
            rest.append(_anywhere(eqn))
            constant.update(dict.fromkeys(eqn.outvars, eqn))
    used = [*(var for eqn in rest for var in eqn.invars), *flat.jaxpr.outvars]
    cut = tuple(dict.fromkeys(var for var in used if isinstance(var, Var) and var in known and var not in constant))
    results = tuple(flat.jaxpr.outvars)
    program = Program(cut, tuple(inner), tuple(rest), results, _structure(cut, inner, rest, results))
    return Lifted(tuple(jnp.asarray(known[var]) for var in cut), program)


@pytree_dataclass
class Deferred:
    """A mask or score mod of the library's own, to be traced when a program is lowered for a platform that needs it.

    All that it reads are its arrays, which are operands until then. A function by a user may read values of an
    enclosing transformation, which are gone by then, so it is lifted at once.

    Attributes:
        arrays: its leaves that are arrays.
        others: its structure, and its leaves with None where an array stands.
    """

    arrays: tuple[Array, ...]
    others: tuple[Any, tuple[Any, ...]] = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Any:
        """The mask or score mod."""
        structure, leaves = self.others
        arrays = iter(self.arrays)
        return jax.tree.unflatten(structure, [next(arrays) if leaf is None else leaf for leaf in leaves])

    @property
    def floats(self) -> tuple[Array, ...]:
        """The arrays that get gradients."""
        return tuple(x for x in self.arrays if _is_float(x))

    def with_floats(self, floats: Sequence[Array]) -> Deferred:
        """The same with other arrays in these places."""
        rest = iter(floats)
        return dataclasses.replace(self, arrays=tuple(next(rest) if _is_float(x) else x for x in self.arrays))


def defer(function: Any) -> Deferred | None:
    """The function as a Deferred, None if something in it is not the library's own."""
    if not is_own(function):
        return None
    leaves, structure = jax.tree.flatten(function)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = tuple(jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array)
    return Deferred(
        arrays, (structure, tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)))
    )


def sum_in_float32(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, the gradients of whose captured float16 and bfloat16 arrays are summed in float32."""
    try:
        traced = jax.make_jaxpr(function)(*arguments)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return function(*arguments)  # the function asks for values, which outside of jit it gets
    if not any(_is_narrow(jnp.result_type(x)) for x in traced.consts):
        return function(*arguments)
    (result,) = inline(traced.jaxpr, traced.consts, arguments)
    return result


# fmt: off
_MOVES = frozenset((
    "broadcast_in_dim", "dynamic_slice", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "tile",
    "transpose",
))
_BROADCASTS = frozenset(("add", "atan2", "div", "max", "min", "mul", "nextafter", "pow", "rem", "sub"))
# fmt: on


def inline(jaxpr: Jaxpr, captured: Sequence[Any], arguments: Sequence[Any], *, rules: bool = True) -> list[Any]:
    """The program's results with calls inlined, with `rules=False` also those that have a derivative of their own.

    Operations that only move numbers move float16 and bfloat16 in float32, which is as exact, so that the gradient that
    one element gets from many places is summed in float32. The same holds where an operation spreads an operand.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*captured, *arguments), strict=True))
    wide: dict[Var, Any] = {}
    for eqn in jaxpr.eqns:
        name, source = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
        dtype: Any = getattr(source.aval, "dtype", None) if isinstance(source, Var) else None
        inner = expansion_of(eqn)
        if name in ("jit", "pjit") or (name in ("custom_jvp_call", "custom_vjp_call") and not rules):
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        if inner is not None:
            results = inline(inner.jaxpr, inner.consts, [_read(env, var) for var in eqn.invars], rules=rules)
            env.update(zip(eqn.outvars, results, strict=True))
        elif isinstance(source, Var) and name in _MOVES and _is_narrow(dtype):
            x = wide[source] if source in wide else jnp.asarray(env[source]).astype(jnp.float32)
            rest = (_read(env, var) for var in eqn.invars[1:])
            (target,) = eqn.outvars
            wide[target] = eqn.primitive.bind(x, *rest, **eqn.primitive.get_bind_params(eqn.params))
            env[target] = wide[target].astype(dtype)
        elif isinstance(source, Var) and source in wide and name == "convert_element_type":
            env[eqn.outvars[0]] = wide[source].astype(eqn.params["new_dtype"])
        elif name in _BROADCASTS and _is_narrow(_example_of(eqn.outvars[0]).dtype):
            (target,) = eqn.outvars
            shape = _example_of(target).shape
            operands = (x.val if isinstance(x, Literal) else _spread_wide(env, wide, x, shape) for x in eqn.invars)
            env[target] = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        else:
            _step(eqn, env)
    return [_read(env, var) for var in jaxpr.outvars]


def expansion_of(eqn: JaxprEqn) -> Any:
    """The program of an operation that JAX makes of others (`jnp.searchsorted` from JAX 0.12 on), else None."""
    expand = getattr(eqn.params.get("_prim"), "expand", None)
    return None if expand is None else jax.make_jaxpr(expand)(*map(_example_of, eqn.invars))


def _spread_wide(env: dict[Var, Any], wide: dict[Var, Any], var: Var, shape: tuple[int, ...]) -> Any:
    """The value of a variable at all places of `shape`; a number stays one."""
    value = env[var]
    return spread(jnp.asarray(value), shape, wide.get(var)) if np.shape(value) else value


def spread(x: Array, shape: tuple[int, ...], wide: Array | None = None) -> Array:
    """x at all places of `shape`. A narrow x is spread in float32, as `wide` if that is known: so is its gradient."""
    if x.shape == shape or not _is_narrow(x.dtype):
        return jnp.broadcast_to(x, shape)
    wide = x.astype(jnp.float32) if wide is None else wide
    return jnp.broadcast_to(wide, shape).astype(x.dtype)


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def _read(env: dict[Var, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def _step(eqn: JaxprEqn, env: dict[Var, Any], later: Mapping[Var, JaxprEqn] | None = None) -> None:
    """Runs an equation in `env`, and before it those of `later` whose results it needs."""
    for var in eqn.invars:
        if later is not None and isinstance(var, Var) and var not in env:
            _step(later[var], env, later)
    if eqn.primitive.name == "reshard":  # a tile is on one device
        env[eqn.outvars[0]] = _read(env, eqn.invars[0])
        return
    results = eqn.primitive.bind(*(_read(env, var) for var in eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
    env.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))


def _anywhere(eqn: JaxprEqn) -> JaxprEqn:
    """The equation without the mesh that it was traced under: a tile of it runs on the shard of a device."""
    meshes = {key: None for key, value in eqn.params.items() if isinstance(value, jax.sharding.Sharding)}
    return eqn.replace(params=eqn.params | meshes) if meshes else eqn


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _add_where_read(total: Array, eqn: JaxprEqn, where: list[Any], share: Array) -> Array:
    """`total` with `share` added at the elements that a gather or dynamic_slice read."""
    share = share.astype(total.dtype)
    if eqn.primitive.name == "dynamic_slice":
        old = lax.dynamic_slice(total, where, share.shape)
        return lax.dynamic_update_slice(total, old + share, where)
    numbers = eqn.params["dimension_numbers"]
    return lax.scatter_add(
        total,
        where[0],
        share,
        lax.ScatterDimensionNumbers(
            update_window_dims=numbers.offset_dims,
            inserted_window_dims=numbers.collapsed_slice_dims,
            scatter_dims_to_operand_dims=numbers.start_index_map,
            operand_batching_dims=numbers.operand_batching_dims,
            scatter_indices_batching_dims=numbers.start_indices_batching_dims,
        ),
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
    )


class UniqueError(Exception):
    """A program with a parameter that equals nothing but itself."""


def _structure(cut: Sequence[Var], inner: Sequence[Var], equations: Sequence[JaxprEqn], results: Any) -> Hashable:
    """Equal for programs that do the same to operands of the same types; unique if that cannot be told."""
    try:
        structure = _structure_of((*cut, *inner), equations, results)
    except UniqueError:
        return object()
    return len(cut), structure


def _structure_of(inputs: Sequence[Var], equations: Sequence[JaxprEqn], results: Sequence[Any]) -> Hashable:
    numbers: dict[Var, int] = {}

    def name(var: Any) -> Hashable:
        if isinstance(var, Literal):
            return str(var.aval), np.asarray(var.val).tobytes()
        return numbers.setdefault(var, len(numbers)), str(var.aval)

    return (
        tuple(map(name, inputs)),
        tuple(
            (eqn.primitive, _structure_of_params(eqn), *(tuple(map(name, v)) for v in (eqn.invars, eqn.outvars)))
            for eqn in equations
        ),
        tuple(map(name, results)),
    )


def _structure_of_params(eqn: JaxprEqn) -> Hashable:
    """The parameters, programs among them by what they do: a loop's, or the rule that a function has as derivative."""
    params: dict[str, Any] = dict(eqn.params)
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        params = {"call": params["call_jaxpr"], "rule": trace_rule(eqn)}
    return tuple((key, _structure_of_param(value)) for key, value in params.items())


def _structure_of_param(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return tuple(map(_structure_of_param, value))
    program = getattr(value, "jaxpr", value)
    if not isinstance(program, Jaxpr):
        if not isinstance(value, Hashable):  # such as a NumPy array
            raise UniqueError
        return value
    if getattr(value, "consts", ()):
        raise UniqueError
    return _structure_of((*program.constvars, *program.invars), program.eqns, program.outvars)


def needed_for(equations: Sequence[JaxprEqn], results: Iterable[Any]) -> list[JaxprEqn]:
    """The equations that lead to some results."""
    kept: list[JaxprEqn] = []
    wanted = {var for var in results if isinstance(var, Var)}
    for eqn in reversed(equations):
        if any(var in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted |= {var for var in eqn.invars if isinstance(var, Var)}
    return kept[::-1]


def trace_rule(eqn: JaxprEqn) -> Any:
    """The derivative of a function that brings its own, as a program without calls.

    Of a `custom_jvp` it takes the operands and the tangents of those that are floating, of a `custom_vjp` the operands
    and the cotangents of the results; it gives the others. Functions with derivatives of their own that it calls, often
    the same one, are inlined: it is not differentiated itself.
    """
    bind = partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params))
    operands, results = (list(map(_example_of, variables)) for variables in (eqn.invars, eqn.outvars))
    moving = [i for i, x in enumerate(operands) if _is_float(x)]

    def of_moving(values: list[Any], new: Sequence[Any]) -> Any:
        values = list(values)
        for i, x in zip(moving, new, strict=True):
            values[i] = x
        return bind(*values)

    def push(values: list[Any], tangents: list[Any]) -> Any:
        at = [values[i] for i in moving]
        return jax.jvp(lambda *new: of_moving(values, new), at, tangents)[1]

    def pull(values: list[Any], cotangents: list[Any]) -> Any:
        return jax.vjp(lambda *new: of_moving(values, new), *(values[i] for i in moving))[1](cotangents)

    if eqn.primitive.name == "custom_jvp_call":
        return flatten(jax.make_jaxpr(push)(operands, [operands[i] for i in moving]), rules=False)
    return flatten(jax.make_jaxpr(pull)(operands, results), rules=False)


def _example_of(var: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def flatten(program: Any, *, rules: bool) -> Any:
    """A traced program with calls inlined, `rules=False` those too that have a derivative of their own, as needed."""
    examples = map(_example_of, program.jaxpr.invars)
    flat = jax.make_jaxpr(lambda *x: inline(program.jaxpr, program.consts, x, rules=rules))(*examples)
    return flat.replace(jaxpr=flat.jaxpr.replace(eqns=needed_for(flat.jaxpr.eqns, flat.jaxpr.outvars)))
