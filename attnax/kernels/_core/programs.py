"""Straight-line programs: functions that JAX traced, with calls inlined, run equation by equation."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from attnax.typing import Array

__all__ = [
    "Program",
    "dtype_of",
    "example_of",
    "expansion_of",
    "flatten",
    "inline",
    "is_float",
    "is_narrow",
    "needed_for",
    "read",
    "shape_of",
    "spread",
    "step",
    "structure_of",
    "trace_rule",
    "without_mesh",
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
    rules: dict[int, Any] = dataclasses.field(default_factory=dict)  # by equation, derivatives that were traced
    found: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name, results of an analysis, as the split

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.structure == other.structure

    def __hash__(self) -> int:
        return hash(self.structure)


# fmt: off
_MOVES = frozenset((
    "broadcast_in_dim", "dynamic_slice", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "tile",
    "transpose",
))
_BROADCASTS = frozenset(("add", "atan2", "div", "max", "min", "mul", "nextafter", "pow", "rem", "sub"))
# fmt: on


def inline(jaxpr: Jaxpr, captured: Sequence[Any], arguments: Sequence[Any], *, rules: bool = True) -> list[Any]:
    """The results of a program with calls inlined; `rules=False` also inlines calls with a custom derivative.

    Operations that move or broadcast numbers carry float16 and bfloat16 as float32. The values stay the same, and the
    gradients of an element that is copied to many places are summed in float32.
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
            results = inline(inner.jaxpr, inner.consts, [read(env, var) for var in eqn.invars], rules=rules)
            env.update(zip(eqn.outvars, results, strict=True))
        elif isinstance(source, Var) and name in _MOVES and is_narrow(dtype):
            x = wide[source] if source in wide else jnp.asarray(env[source]).astype(jnp.float32)
            rest = (read(env, var) for var in eqn.invars[1:])
            (target,) = eqn.outvars
            wide[target] = eqn.primitive.bind(x, *rest, **eqn.primitive.get_bind_params(eqn.params))
            env[target] = wide[target].astype(dtype)
        elif isinstance(source, Var) and source in wide and name == "convert_element_type":
            env[eqn.outvars[0]] = wide[source].astype(eqn.params["new_dtype"])
        elif name in _BROADCASTS and is_narrow(example_of(eqn.outvars[0]).dtype):
            (target,) = eqn.outvars
            shape = example_of(target).shape
            operands = (x.val if isinstance(x, Literal) else _spread_wide(env, wide, x, shape) for x in eqn.invars)
            env[target] = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        else:
            step(eqn, env)
    return [read(env, var) for var in jaxpr.outvars]


def expansion_of(eqn: JaxprEqn) -> Any:
    """The program of an operation that JAX composes (`jnp.searchsorted` from JAX 0.12 on), else None."""
    expand = getattr(eqn.params.get("_prim"), "expand", None)
    return None if expand is None else jax.make_jaxpr(expand)(*map(example_of, eqn.invars))


def _spread_wide(env: dict[Var, Any], wide: dict[Var, Any], var: Var, shape: tuple[int, ...]) -> Any:
    """The value of a variable, broadcast to `shape`; a number stays a number."""
    value = env[var]
    return spread(jnp.asarray(value), shape, wide.get(var)) if np.shape(value) else value


def spread(x: Array, shape: tuple[int, ...], wide: Array | None = None) -> Array:
    """`x` broadcast to `shape`. A narrow `x` is broadcast in float32 (`wide` if known), for the sum of its gradient."""
    if x.shape == shape or not is_narrow(x.dtype):
        return jnp.broadcast_to(x, shape)
    wide = x.astype(jnp.float32) if wide is None else wide
    return jnp.broadcast_to(wide, shape).astype(x.dtype)


def is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def read(env: dict[Var, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def step(eqn: JaxprEqn, env: dict[Var, Any], later: Mapping[Var, JaxprEqn] | None = None) -> None:
    """Runs an equation in `env`, after the equations of `later` whose results it needs."""
    for var in eqn.invars:
        if later is not None and isinstance(var, Var) and var not in env:
            step(later[var], env, later)
    if eqn.primitive.name == "reshard":  # a tile is on one device
        env[eqn.outvars[0]] = read(env, eqn.invars[0])
        return
    results = eqn.primitive.bind(*(read(env, var) for var in eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
    env.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))


def without_mesh(eqn: JaxprEqn) -> JaxprEqn:
    """The equation without the mesh of its trace: a tile runs on the shard of one device."""
    meshes = {key: None for key, value in eqn.params.items() if isinstance(value, jax.sharding.Sharding)}
    return eqn.replace(params=eqn.params | meshes) if meshes else eqn


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


class UniqueError(Exception):
    """A parameter of a program equals only itself."""


def structure_of(cut: Sequence[Var], inner: Sequence[Var], equations: Sequence[JaxprEqn], results: Any) -> Hashable:
    """A key: equal for equal programs on operands of equal types, unique if equality cannot be told."""
    try:
        structure = _equations_structure((*cut, *inner), equations, results)
    except UniqueError:
        return object()
    return len(cut), structure


def _equations_structure(inputs: Sequence[Var], equations: Sequence[JaxprEqn], results: Sequence[Any]) -> Hashable:
    numbers: dict[Var, int] = {}

    def name(var: Any) -> Hashable:
        if isinstance(var, Literal):
            return str(var.aval), np.asarray(var.val).tobytes()
        return numbers.setdefault(var, len(numbers)), str(var.aval)

    return (
        tuple(map(name, inputs)),
        tuple(
            (eqn.primitive, _params_structure(eqn), *(tuple(map(name, v)) for v in (eqn.invars, eqn.outvars)))
            for eqn in equations
        ),
        tuple(map(name, results)),
    )


def _params_structure(eqn: JaxprEqn) -> Hashable:
    """The parameters; programs among them, such as a loop's body or a derivative, by their structure."""
    params: dict[str, Any] = dict(eqn.params)
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        params = {"call": params["call_jaxpr"], "rule": trace_rule(eqn)}
    return tuple((key, _param_structure(value)) for key, value in params.items())


def _param_structure(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return tuple(map(_param_structure, value))
    program = getattr(value, "jaxpr", value)
    if not isinstance(program, Jaxpr):
        if not isinstance(value, Hashable):  # such as a NumPy array
            raise UniqueError
        return value
    if getattr(value, "consts", ()):
        raise UniqueError
    return _equations_structure((*program.constvars, *program.invars), program.eqns, program.outvars)


def needed_for(equations: Sequence[JaxprEqn], results: Iterable[Any], *, effects: bool = False) -> list[JaxprEqn]:
    """The equations that some results need, and with `effects` also the equations that effects need."""
    kept: list[JaxprEqn] = []
    wanted = {var for var in results if isinstance(var, Var)}
    for eqn in reversed(equations):
        if any(var in wanted for var in eqn.outvars) or (effects and eqn.effects):
            kept.append(eqn)
            wanted |= {var for var in eqn.invars if isinstance(var, Var)}
    return kept[::-1]


def trace_rule(eqn: JaxprEqn) -> Any:
    """The custom derivative of a function, as a program without calls.

    The rule of a `custom_jvp` maps operands and tangents of floating operands to tangents of results. The rule of a
    `custom_vjp` maps operands and cotangents of results to cotangents of floating operands. All calls in a rule are
    inlined, because a rule is not differentiated.
    """
    bind = partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params))
    operands, results = (list(map(example_of, variables)) for variables in (eqn.invars, eqn.outvars))
    moving = [i for i, x in enumerate(operands) if is_float(x)]

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


def example_of(var: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def dtype_of(var: Any) -> Any:
    """The dtype of a variable."""
    return var.aval.dtype


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable."""
    return tuple(var.aval.shape)


def flatten(program: Any, *, rules: bool) -> Any:
    """A traced program with calls inlined, and without equations that its results do not need; see `inline`."""
    examples = map(example_of, program.jaxpr.invars)
    flat = jax.make_jaxpr(lambda *x: inline(program.jaxpr, program.consts, x, rules=rules))(*examples)
    return flat.replace(jaxpr=flat.jaxpr.replace(eqns=needed_for(flat.jaxpr.eqns, flat.jaxpr.outvars)))
