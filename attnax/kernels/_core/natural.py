"""A function of pairs, traced once at sizes that no array has, and run at any shapes.

`MARKS` identify the axes of the pairs in the shapes of a traced function. If the function is elementwise and reads
single elements of captured arrays, the program is not tied to these sizes. The natural shape of a value is the
broadcast shape of the indices on which the value depends. The same equations then serve a tile of any size, transposed
or not, a tile of a GPU kernel, and whole arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.programs import Program, dtype_of, flatten, is_narrow, shape_of, spread, trace_rule
from attnax.typing import Array

__all__ = [
    "ELEMENTWISE",
    "GPU_ELEMENTWISE",
    "MARKS",
    "SHAPE",
    "TPU_ELEMENTWISE",
    "Bind",
    "align",
    "evaluate",
    "examples",
    "gather",
    "no_table",
    "run_varying",
    "why_not_natural",
]

MARKS = 499, 503, 1009, 1013
"""Sizes of (B, N, T, S) at which functions are traced: unequal primes that no real axis has."""

# fmt: off
GPU_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "convert_element_type", "copy", "cos", "cosh", "div",
    "eq", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic",
    "lt", "max", "min", "mul", "ne", "neg", "not", "or", "population_count", "pow", "rem", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
"""The elementwise primitives of the GPU kernels."""

TPU_ELEMENTWISE = GPU_ELEMENTWISE - {
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "cosh", "expm1", "sinh",
} | {"erf_inv", "round"}
"""The elementwise primitives of the TPU kernels: those that Pallas lowers and libtpu compiles."""

ELEMENTWISE = GPU_ELEMENTWISE | frozenset((
    "bessel_i0e", "bessel_i1e", "complex", "conj", "copy_p", "digamma", "eq_to", "erf", "erf_inv", "erfc", "igamma",
    "igamma_grad_a", "igammac", "imag", "le_to", "lgamma", "log2", "lt_to", "mesh_cast", "mulhi", "name", "nextafter",
    "one_minus_square", "optimization_barrier", "pcast", "polygamma", "polynomial", "pvary", "random_fold_in",
    "random_seed", "real", "reduce_precision", "regularized_incomplete_beta", "reshard", "round",
    "sharding_constraint", "threefry2x32", "zeta",
))
"""All elementwise primitives."""

SHAPE = frozenset(("broadcast_in_dim", "expand_dims", "pcast", "pvary", "reshape", "reshard", "squeeze"))
"""Primitives that change neither the values nor their natural shape."""

# These broadcast axes of size 1 by themselves.
_BROADCASTING = frozenset((
    "add", "and", "atan2", "div", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne", "or", "pow", "rem", "sub",
    "xor",
))
_OF_SHAPES = frozenset((  # with several results, of random keys, or of a mesh
    "mesh_cast", "optimization_barrier", "random_fold_in", "random_seed", "sharding_constraint", "threefry2x32",
))
# fmt: on
_CUSTOM = "custom_jvp_call"
_MODES = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS, lax.GatherScatterMode.FILL_OR_DROP


def examples(scores: Any = None, sizes: Sequence[int] = MARKS, axes: frozenset[str] = frozenset()) -> tuple[Any, ...]:
    """Arguments for a trace: indices (b, h, q, kv) of these sizes, preceded by scores if `scores` is a dtype."""

    def example(shape: tuple[int, ...], dtype: Any) -> Any:
        return vary(jnp.zeros(shape, dtype), axes) if axes else jax.ShapeDtypeStruct(shape, dtype)

    indices = tuple(example((1,) * i + (size,) + (1,) * (3 - i), jnp.int32) for i, size in enumerate(sizes))
    return indices if scores is None else (example(tuple(sizes), scores), *indices)


class TiedToShapeError(Exception):
    """A program is tied to the sizes at which it was traced; the message says why."""


def why_not_natural(program: Program, elementwise: frozenset[str] = ELEMENTWISE - _OF_SHAPES) -> str | None:
    """The reason why a program is tied to the marked sizes of its trace, or None.

    Args:
        program: traced at arguments from `examples`, or at ranges of them.
        elementwise: the primitives that the program may use.
    """
    captured = set(program.captured)
    try:
        for eqn in program.equations:
            _check(eqn, captured, elementwise)
            tables = eqn.invars[:1] if eqn.primitive.name == "gather" else []
            _check_used([var for var in eqn.invars if var not in tables], captured)
        _check_used(program.results, captured)
        for result in program.results:
            shape = shape_of(result)
            if len(shape) > 4 or any(
                have not in (1, mark) for have, mark in zip(shape[::-1], MARKS[::-1], strict=False)
            ):
                raise TiedToShapeError(f"it gives results of shape {shape}")
    except TiedToShapeError as refusal:
        return str(refusal)
    return None


def _check_used(variables: Iterable[Any], captured: set[Var]) -> None:
    for var in variables:
        if isinstance(var, Var) and var in captured and math.prod(shape_of(var)) != 1:
            raise TiedToShapeError(
                f"it uses a captured array of shape {shape_of(var)} as a whole; index it by b, h, q and kv"
            )


def _check(eqn: JaxprEqn, captured: set[Var], elementwise: frozenset[str]) -> None:
    name = eqn.primitive.name
    shapes = [shape_of(var) for var in (*eqn.invars, *eqn.outvars)]
    if name == "gather":
        _check_gather(eqn, captured)
    elif name == "concatenate":
        last = len(shapes[-1]) - 1
        if eqn.params["dimension"] != last or any(shape[-1] != 1 for shape in shapes[:-1]):
            raise TiedToShapeError("concatenate")
    elif name == _CUSTOM:
        for program in _call_and_rule(eqn):
            for inner in program.jaxpr.eqns:
                _check(inner, set(), elementwise)
    elif name in SHAPE:
        if _marks(shapes[0]) != [mark for mark in _marks(shapes[-1]) if mark in _marks(shapes[0])]:
            raise TiedToShapeError(f"{name} to shape {shapes[-1]}")
    elif name not in elementwise or eqn.effects:
        raise TiedToShapeError(name)
    if any(isinstance(var, Var) and jnp.issubdtype(dtype_of(var), jnp.complexfloating) for var in eqn.outvars):
        raise TiedToShapeError("complex numbers")
    for var in eqn.outvars:
        odd = [size for size in shape_of(var) if size != 1 and size not in MARKS]
        if odd and name != "concatenate":
            raise TiedToShapeError(f"{name} with an axis of size {odd[0]}")


def _check_gather(eqn: JaxprEqn, captured: set[Var]) -> None:
    table, _ = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    shape = shape_of(table)
    whole = tuple(range(len(shape)))
    if not isinstance(table, Var) or table not in captured:
        raise TiedToShapeError("gather of computed values")
    left = set(whole) - set(numbers.start_index_map)
    is_element = not (numbers.operand_batching_dims or numbers.offset_dims) and numbers.collapsed_slice_dims == whole
    if not is_element or any(shape[axis] != 1 for axis in left):
        raise TiedToShapeError(f"gather of slices; index all {len(shape)} axes of the captured array")
    if eqn.params["mode"] not in _MODES:
        raise TiedToShapeError(f"gather in mode {eqn.params['mode']}")


Gather = Callable[[JaxprEqn, tuple[Any, ...]], Any]
"""The elements that a gather reads, given an index for each indexed axis."""

Bind = Callable[[JaxprEqn, list[Any]], Any]
"""The result of an elementwise equation on values of natural shapes."""


def evaluate(
    equations: Sequence[JaxprEqn],
    env: dict[Any, Any],
    rules: dict[int, Any],
    gather: Gather,
    bind: Bind | None = None,
) -> None:
    """Runs equations on values of natural shapes. The result of `concatenate` is an index: a tuple of its parts.

    Args:
        equations: of a program that `why_not_natural` accepts.
        env: the values so far; the results are added. All values with axes have the same number of axes.
        rules: the `Program.rules`.
        gather: reads captured arrays.
        bind: runs an elementwise equation; by default as `run_varying` does.
    """
    bind = _bind if bind is None else bind

    def read(var: Any) -> Any:
        value = dtype_of(var).type(var.val) if isinstance(var, Literal) else env[var]
        # A captured array of one element may have any number of axes. A kernel that learns it uses one per row.
        is_number = np.ndim(value) and jnp.size(value) == 1 and not _marks(shape_of(var))
        return value.reshape(()) if is_number else value

    for eqn in equations:
        name = eqn.primitive.name
        if name == "gather":
            index = env[eqn.invars[1]] if isinstance(eqn.invars[1], Var) else read(eqn.invars[1])
            results = [gather(eqn, index if isinstance(index, tuple) else (index,))]
        elif name == "concatenate":
            results = [tuple(map(read, eqn.invars))]
        elif name == _CUSTOM:
            results = list(_call_with_rule(eqn, [read(var) for var in eqn.invars], rules, bind))
        elif name in SHAPE:
            results = [read(eqn.invars[0])]
        else:
            results = [bind(eqn, [read(var) for var in eqn.invars])]
        env.update(zip(eqn.outvars, results, strict=True))


def _bind(eqn: JaxprEqn, values: list[Any]) -> Any:
    if eqn.primitive.name not in _BROADCASTING or is_narrow(dtype_of(eqn.outvars[0])):
        values = align(eqn, values)
    return run_varying(eqn, values)


def run_varying(eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    """The result of an equation on values that may vary over different mesh axes."""
    axes = frozenset().union(*map(varying_axes, values))
    return eqn.primitive.bind(*(vary(x, axes) for x in values), **eqn.params)


def align(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """The operands of an elementwise equation, broadcast to one shape; traced numbers stay numbers."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, values))
    return [
        x if jnp.shape(x) in (shape, shape_of(var)) else spread(jnp.asarray(x), shape)
        for x, var in zip(values, eqn.invars, strict=True)
    ]


def gather(table: Array, eqn: JaxprEqn, index: tuple[Any, ...]) -> tuple[Array, Array]:
    """The elements that a gather reads from a table, and the array of indices (..., indexed axes)."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, index))
    parts = [lax.expand_dims(spread(jnp.asarray(x), shape), [len(shape)]) for x in index]
    where = parts[0] if len(parts) == 1 else lax.concatenate(parts, len(shape))
    return run_varying(eqn, (table, where)), where


def _call_and_rule(eqn: JaxprEqn) -> tuple[Any, Any]:
    """The programs of a function with a custom derivative: the result, and the tangent of the result."""
    programs = flatten(eqn.params["call_jaxpr"], rules=True), trace_rule(eqn)
    if any(program.consts for program in programs):
        raise TiedToShapeError(f"{eqn.primitive.name} with arrays of its own")
    return programs


def _call_with_rule(eqn: JaxprEqn, values: Sequence[Any], rules: dict[int, Any], bind: Bind) -> Sequence[Array]:
    """The results of a function with a custom derivative; the derivative is kept."""
    if id(eqn) not in rules:
        rules[id(eqn)] = _call_and_rule(eqn)
    of_call, of_rule = rules[id(eqn)]
    # The tangent of a result may vary along more axes than the result.
    shape = jnp.broadcast_shapes(*map(jnp.shape, values))
    if len(values) > 1:
        values = [
            spread(jnp.asarray(x), shape) if shape_of(var) else x for x, var in zip(values, eqn.invars, strict=True)
        ]

    def run(program: Any, *values: Any) -> list[Array]:
        env: dict[Any, Any] = dict(zip(program.jaxpr.invars, values, strict=True))
        evaluate(program.jaxpr.eqns, env, rules, no_table, bind)
        return [jnp.asarray(x.val if isinstance(x, Literal) else env[x], dtype_of(x)) for x in program.jaxpr.outvars]

    @jax.custom_jvp
    def call(*values: Any) -> list[Array]:
        return run(of_call, *values)

    @call.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Array], list[Array]]:
        moving = (t for x, t in zip(primals, tangents, strict=True) if jnp.issubdtype(x.dtype, jnp.floating))
        results = call(*primals)
        changes = run(of_rule, *primals, *moving)
        return results, [jnp.broadcast_to(d, x.shape) for d, x in zip(changes, results, strict=True)]

    return call(*values)


def no_table(eqn: JaxprEqn, index: Any) -> Array:
    raise AssertionError(f"{eqn.primitive.name} needs a table")


def _marks(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
