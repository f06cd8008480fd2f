"""Interval arithmetic on a traced mask: which tiles a user's function leaves empty or full, without all of their pairs.

The indices of a tile are ranges. Every equation of the program maps ranges to a range: `q - kv` lies between
`first q - last kv` and `last q - first kv`, and `q - kv < 256` is True, False or either. A bound is safe, but need not
be tight: a value that occurs twice counts as two values. An equation without a rule gives "anything".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from attnax.kernels._core import natural
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary_all, varying_axes
from attnax.kernels._core.programs import dtype_of, shape_of
from attnax.masks.mask import range_bounds, range_tables
from attnax.typing import Array

__all__ = ["bounds_of"]


class Interval(NamedTuple):
    """All values between two numbers, both included; a boolean lies between False and True."""

    low: Any
    high: Any

    @property
    def is_exact(self) -> bool:
        """Whether the bounds are known to be one value."""
        return self.low is self.high


def bounds_of(mask: Lifted, b: Array, h: Array, *ends: Array) -> tuple[Array, Array] | None:
    """As `Mask.tile`, for ends (first and last q, first and last kv); None if nothing can be told of any tile."""
    if mask.refusal is not None:
        return None
    program = mask.program
    axes = frozenset().union(*map(varying_axes, (*mask.values, b, h, *ends)))
    values, (b, h, *ends) = vary_all((mask.values, (b, h, *ends)), axes)
    q, kv = Interval(ends[0], ends[1]), Interval(ends[2], ends[3])
    env: dict[Any, Any] = {var: Interval(x, x) for var, x in zip(program.captured, values, strict=True)}
    env |= zip(program.arguments, (Interval(b, b), Interval(h, h), q, kv), strict=True)
    tables: dict[int, list[Any]] = {}
    for eqn in program.equations:
        results = _step(eqn, [_read(env, var) for var in eqn.invars], program.rules, tables)
        env |= zip(eqn.outvars, results, strict=True)
    result = _read(env, program.results[0])
    return None if result is None else (jnp.asarray(result.high), jnp.asarray(result.low))


def _read(env: dict[Any, Any], var: Any) -> Any:
    """An Interval, None for anything, or a tuple of both: the index of a gather."""
    if not isinstance(var, Literal):
        return env[var]
    value = dtype_of(var).type(var.val)
    return Interval(value, value)


def _step(eqn: JaxprEqn, operands: list[Any], rules: dict[int, Any], tables: dict[int, list[Any]]) -> list[Any]:
    """The results of an equation; `tables` holds the tables of captured arrays by their id."""
    name = eqn.primitive.name
    if name in natural.SHAPE:
        return operands[:1]
    if name == "concatenate":
        return [tuple(operands)]
    parts = [part for x in operands for part in (x if isinstance(x, tuple) and not isinstance(x, Interval) else (x,))]
    unknown: list[Any] = [None] * len(eqn.outvars)
    if None in parts:
        return (
            [_OF_UNKNOWN[name](*operands)] if name in _OF_UNKNOWN and dtype_of(eqn.outvars[0]) == np.bool_ else unknown
        )
    if all(part.is_exact for part in parts):
        return [Interval(x, x) for x in _exact(eqn, operands, rules)]
    if name == "gather":
        return [_gather(eqn, operands, tables)]
    if name not in _RULES or not all(_has_order(dtype_of(var)) for var in (*eqn.invars, *eqn.outvars)):
        return unknown
    return [_RULES[name](eqn, *map(_number, operands))]


def _number(x: Interval) -> Interval:
    """A known array of one element as a number, which any shape takes."""
    return Interval(*(jnp.reshape(end, ()) for end in x)) if x.is_exact and jnp.size(x.low) == 1 else x


def _exact(eqn: JaxprEqn, operands: list[Any], rules: dict[int, Any]) -> list[Array]:
    """The results of an equation whose operands are known."""
    env: dict[Any, Any] = {
        var: x.low if isinstance(x, Interval) else tuple(part.low for part in x)
        for var, x in zip(eqn.invars, operands, strict=True)
        if not isinstance(var, Literal)
    }
    natural.evaluate([eqn], env, rules, lambda eqn, index: natural.gather(env[eqn.invars[0]], eqn, index)[0])
    return [env[var] for var in eqn.outvars]


def _gather(eqn: JaxprEqn, operands: list[Any], tables: dict[int, list[Any]]) -> Interval | None:
    """The least and the greatest element that a range of the last index reads."""
    index = operands[1]
    order = eqn.params["dimension_numbers"].start_index_map
    index = dict(zip(order, (index,) if isinstance(index, Interval) else index, strict=True))
    *rows, last = axes = sorted(order)
    dtype = dtype_of(eqn.invars[0])
    if len(rows) > 1 or any(not index[axis].is_exact for axis in rows) or not _has_order(dtype):
        return None
    low, high = index[last]
    row = index[rows[0]].low if rows else 0
    values, shape = operands[0].low, shape_of(eqn.invars[0])
    values = values.reshape([shape[axis] for axis in axes] if rows else (1, -1))
    name = id(operands[0].low)
    if name not in tables:
        tables[name] = range_tables(values)
    fits = (low >= 0) & (high < values.shape[1]) & (row >= 0) & (row < values.shape[0])
    return _where(fits, Interval(*range_bounds(values, row, (low, high), tables[name])), dtype)


def _has_order(dtype: Any) -> bool:
    """Whether intervals of this dtype are computed."""
    return dtype == np.bool_ or dtype in (np.int32, np.int64)


def _where(holds: Any, interval: Interval, dtype: Any) -> Interval:
    """The interval where `holds`, elsewhere anything."""
    least, greatest = (False, True) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return Interval(jnp.where(holds, interval.low, least), jnp.where(holds, interval.high, greatest))


def _ordered(*values: Any) -> Interval:
    """The interval between the least and the greatest of some values."""
    low = high = values[0]
    for value in values[1:]:
        low, high = jnp.minimum(low, value), jnp.maximum(high, value)
    return Interval(low, high)


def _within(limit: float, *ends: Any) -> Any:
    """Whether all ends are far from the limits of the dtype, where integers wrap around."""
    holds: Any = True
    for end in ends:
        holds = holds & (jnp.abs(jnp.asarray(end, jnp.float32)) < limit)
    return holds


def _wrapping(rule: Callable[..., Interval], *, product: bool = False) -> Callable[..., Interval]:
    """A rule of integers whose result is anything where the result could wrap around."""

    def safe(eqn: JaxprEqn, *operands: Interval) -> Interval:
        dtype = dtype_of(eqn.outvars[0])
        limit = 2.0 ** (np.iinfo(dtype).bits - 2)
        ends = [end for operand in operands for end in operand]
        fits = _within(limit, *ends)
        if product:
            x, y = (jnp.maximum(*(jnp.abs(jnp.asarray(end, jnp.float32)) for end in x)) for x in operands)
            fits = fits & (x * y < limit)
        return _where(fits, rule(*operands), dtype)

    return safe


def _mul(x: Interval, y: Interval) -> Interval:
    return _ordered(*(one * other for one in x for other in y))


def _abs(x: Interval) -> Interval:
    low, high = _ordered(jnp.abs(x.low), jnp.abs(x.high))
    return Interval(jnp.where((x.low <= 0) & (x.high >= 0), 0, low), high)


def _div(eqn: JaxprEqn, x: Interval, y: Interval) -> Interval:
    """Division towards zero, by a number above 0: it keeps the order."""
    divisor = jnp.maximum(y.low, 1)
    quotients = (jax.lax.div(*jnp.broadcast_arrays(end, divisor)) for end in x)
    return _where((y.low == y.high) & (y.low > 0), Interval(*quotients), dtype_of(eqn.outvars[0]))


def _rem(eqn: JaxprEqn, x: Interval, y: Interval) -> Interval:
    """The remainder, with the sign of x, of a division by a number above 0."""
    divisor = jnp.maximum(y.low, 1)
    (first, low), (last, high) = (
        (jax.lax.div(*pair), jax.lax.rem(*pair)) for pair in (jnp.broadcast_arrays(end, divisor) for end in x)
    )
    same = (first == last) & ((x.low >= 0) | (x.high <= 0))  # between two multiples the remainder grows with x
    low = jnp.where(same, low, jnp.where(x.low >= 0, 0, 1 - divisor))
    high = jnp.where(same, high, jnp.where(x.high <= 0, 0, divisor - 1))
    return _where((y.low == y.high) & (y.low > 0), Interval(low, high), dtype_of(eqn.outvars[0]))


def _shift(eqn: JaxprEqn, x: Interval, y: Interval) -> Interval:
    """A shift to the right, which keeps the order of numbers."""
    dtype = dtype_of(eqn.outvars[0])
    fits = (y.low == y.high) & (y.low >= 0) & (y.low < np.iinfo(dtype).bits)
    shifted = (jnp.right_shift(end, jnp.where(fits, y.low, 0)) for end in x)
    return _where(fits, Interval(*shifted), dtype)


def _less(compare: Callable[[Any, Any], Any]) -> Callable[..., Interval]:
    return lambda eqn, x, y: Interval(compare(x.high, y.low), compare(x.low, y.high))


def _equal(eqn: JaxprEqn, x: Interval, y: Interval) -> Interval:
    overlap = (x.low <= y.high) & (y.low <= x.high)
    return Interval((x.low == x.high) & (y.low == y.high) & overlap, overlap)


def _not(eqn: JaxprEqn, x: Interval) -> Interval:
    return Interval(~x.high, ~x.low)


def _monotone(function: Callable[..., Any]) -> Callable[..., Interval]:
    """A rule of a function that grows with each of its arguments."""
    return lambda eqn, *operands: Interval(*(function(*ends) for ends in zip(*operands, strict=True)))


def _booleans(function: Callable[..., Any]) -> Callable[..., Interval | None]:
    """`and` and `or` of booleans; of the bits of integers nothing is told."""
    rule = _monotone(function)
    return lambda eqn, *operands: rule(eqn, *operands) if dtype_of(eqn.outvars[0]) == np.bool_ else None


def _select(eqn: JaxprEqn, which: Interval, *cases: Interval) -> Interval | None:
    """`cases[0]` where `which` is False, `cases[1]` where True, and both where it may be either."""
    if dtype_of(eqn.invars[0]) != np.bool_:
        return None
    either = [
        function(*ends) for function, ends in zip((jnp.minimum, jnp.maximum), zip(*cases, strict=True), strict=True)
    ]
    return Interval(
        *(
            jnp.where(which.low, if_true, jnp.where(which.high, both, if_false))
            for both, if_false, if_true in zip(either, *cases, strict=True)
        )
    )


def _convert(eqn: JaxprEqn, x: Interval) -> Interval | None:
    have, want = dtype_of(eqn.invars[0]), dtype_of(eqn.outvars[0])
    if want.itemsize < have.itemsize or (want == np.bool_ and have != np.bool_):
        return None
    return Interval(*(jnp.asarray(end, want) for end in x))


_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": _wrapping(lambda x, y: Interval(x.low + y.low, x.high + y.high)),
    "sub": _wrapping(lambda x, y: Interval(x.low - y.high, x.high - y.low)),
    "mul": _wrapping(_mul, product=True),
    "neg": _wrapping(lambda x: Interval(-x.high, -x.low)),
    "abs": _wrapping(_abs),
    "div": _div,
    "rem": _rem,
    "shift_right_arithmetic": _shift,
    "sign": _monotone(jnp.sign),
    "max": _monotone(jnp.maximum),
    "min": _monotone(jnp.minimum),
    "clamp": _monotone(lambda least, x, greatest: jnp.minimum(jnp.maximum(x, least), greatest)),
    "and": _booleans(operator.and_),
    "or": _booleans(operator.or_),
    "not": _not,
    "lt": _less(operator.lt),
    "le": _less(operator.le),
    "gt": lambda eqn, x, y: _less(operator.lt)(eqn, y, x),
    "ge": lambda eqn, x, y: _less(operator.le)(eqn, y, x),
    "eq": _equal,
    "ne": lambda eqn, x, y: _not(eqn, _equal(eqn, x, y)),
    "select_n": _select,
    "convert_element_type": _convert,
}
"""By primitive, `(equation, *intervals) -> interval` for integers and booleans."""

_OF_UNKNOWN: dict[str, Callable[..., Interval | None]] = {
    "and": lambda x, y: None if x is None and y is None else Interval(np.False_, (x or y).high),
    "or": lambda x, y: None if x is None and y is None else Interval((x or y).low, np.True_),
}
"""The rules of primitives that tell something although they know nothing of an operand: booleans only."""
