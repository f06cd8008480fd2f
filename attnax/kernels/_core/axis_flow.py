"""Follows the axes of all values through the program of a mask or score mod.

An operation that mixes an axis of the pairs (a row's maximum, a roll, a product over heads) is refused by name. The
file is longer than 500 lines because each primitive of JAX needs a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from attnax.kernels._core.natural import ELEMENTWISE
from attnax.kernels._core.programs import expansion_of, needed_for, shape_of

__all__ = ["RefusedError", "check_program", "inner_programs", "sizes_mixed"]


# fmt: off
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "checkpoint": "jaxpr",
    "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}
# fmt: on


class Factor(NamedTuple):
    """A factor of an axis: `reshape` merges and splits axes.

    `kind` is the name of an axis of the pairs, "array" for an axis of an array or of features along which values
    differ, or "same" for an axis along which all values are equal.
    """

    kind: str
    size: int


Axis = tuple[Factor, ...]


class Value(NamedTuple):
    """The axes of a value, and the loops over axes of the pairs that compute the value."""

    axes: tuple[Axis, ...]
    steps: frozenset[Any] = frozenset()


class RefusedError(Exception):
    """The function mixes pairs; the message names the operation."""


_PAIRS = ("batch", "heads", "queries", "keys")
Rule = Callable[[JaxprEqn, Sequence[Value]], Sequence[Value]]


def check_program(program: Any, score_shape: tuple[int, ...], has_scores: bool) -> None:
    """Raises RefusedError unless the result at a pair depends on that pair alone."""
    of_pairs = [_axis(kind, size) for kind, size in zip(_PAIRS, score_shape, strict=True)]
    arguments = [Value(tuple(axis if i == j else () for j in range(4))) for i, axis in enumerate(of_pairs)]
    if has_scores:
        arguments.insert(0, Value(tuple(of_pairs)))
    (result,) = _follow(program.jaxpr, program.consts, arguments)
    for axis, kind, size in zip(reversed(result.axes), reversed(_PAIRS), reversed(score_shape), strict=False):
        foreign = {factor.kind for factor in axis} - {"same", kind}
        if "array" in foreign:
            raise RefusedError(f"gives an array of its own along the {kind}")
        if foreign:
            raise RefusedError(f"gives {foreign.pop()} along the {kind}")
        if _size(axis) not in (1, size):
            raise RefusedError(f"gives {_size(axis)} results for {size} {kind}")


def _follow(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """The axes of the results of a program."""
    known: dict[Var, Value] = dict(zip(jaxpr.constvars, map(_of_array, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(var: Any) -> Value:
        return _of_array(var.aval) if isinstance(var, Literal) else known[var]

    for eqn in needed_for(jaxpr.eqns, jaxpr.outvars):  # equations that only print may mix pairs
        name = eqn.primitive.name
        inputs = [read(var) for var in eqn.invars]
        rule = _RULES.get(name, _elementwise if name in ELEMENTWISE else None)
        if rule is not None:
            outputs = list(rule(eqn, inputs))
        elif name in _CALLS:
            outputs = _follow_call(eqn.params[_CALLS[name]], inputs)
        elif (expansion := expansion_of(eqn)) is not None:
            outputs = _follow_call(expansion, inputs)
        elif any(map(_kinds, inputs)):
            raise RefusedError(f"uses {name}, of which it is not known whether it mixes pairs")
        else:
            outputs = [_of_array(var.aval) for var in eqn.outvars]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _follow_call(inner: Any, inputs: Sequence[Value]) -> list[Value]:
    return _follow(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)


def _axis(kind: str, size: int) -> Axis:
    return (Factor(kind, size),) if size != 1 else ()


def _size(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def _kinds(value: Value) -> set[str]:
    """The axes of the pairs along which a value varies."""
    return {factor.kind for axis in value.axes for factor in axis} & set(_PAIRS) | ({"step"} if value.steps else set())


def _of_array(array: Any) -> Value:
    return Value(tuple(_axis("array", size) for size in np.shape(array)))


def _mixed(eqn: JaxprEqn, axis: Axis) -> None:
    """Raises RefusedError if `axis`, which the equation mixes, is an axis of the pairs."""
    kinds = [factor.kind for factor in axis if factor.kind in _PAIRS]
    if kinds:
        raise RefusedError(f"mixes {' and '.join(kinds)} by {eqn.primitive.name}")


def _join(eqn: JaxprEqn, values: Iterable[Value]) -> Value:
    """The axes of the result of an elementwise operation; numbers broadcast."""
    values = list(values)
    rank = max((len(value.axes) for value in values), default=0)
    whole = [value for value in values if len(value.axes) == rank]
    axes = [_join_axes(eqn, [value.axes[i] for value in whole]) for i in range(rank)]
    return Value(tuple(axes), frozenset().union(*(value.steps for value in values)))


def _join_axes(eqn: JaxprEqn, axes: Sequence[Axis]) -> Axis:
    joined: Axis = ()
    for axis in axes:
        if all(factor.kind == "same" for factor in joined):
            joined = axis if _size(axis) >= _size(joined) else joined
        elif any(factor.kind != "same" for factor in axis):
            joined = _meet(eqn, joined, axis)
    return joined


def _meet(eqn: JaxprEqn, left: Axis, right: Axis) -> Axis:
    """The common axis of two values, factor by factor."""
    joined: list[Factor] = []
    rest = [list(reversed(left)), list(reversed(right))]
    while rest[0] and rest[1]:
        one, two = rest[0].pop(), rest[1].pop()
        for mine, other, stack in ((one, two, rest[0]), (two, one, rest[1])):
            if mine.size > other.size and mine.kind in ("same", "array") and mine.size % other.size == 0:
                stack.append(Factor(mine.kind, mine.size // other.size))
        kinds = {one.kind, two.kind} - {"same"}
        split = [x for x in (one, two) if x.size > min(one.size, two.size)]
        if len(kinds) > 1 or any(x.kind in _PAIRS for x in split):
            what = " and ".join(sorted(kinds & set(_PAIRS)))
            if "array" in kinds:
                raise RefusedError(f"uses an array as a whole along the {what}")
            raise RefusedError(f"mixes {what} by {eqn.primitive.name}")
        joined.append(Factor(kinds.pop() if kinds else "same", min(one.size, two.size)))
    return tuple(joined)


def _elementwise(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    if eqn.primitive.name == "optimization_barrier":
        return list(inputs)
    return [_join(eqn, inputs)] * len(eqn.outvars)


def _broadcast(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    operand, shape = inputs[0], eqn.params["shape"]
    axes = [_axis("same", size) for size in shape]
    for source, target in enumerate(eqn.params["broadcast_dimensions"]):
        if _size(operand.axes[source]) == shape[target]:
            axes[target] = operand.axes[source]
    return [Value(tuple(axes), operand.steps)]


def _reshape(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    rest = [factor for axis in inputs[0].axes for factor in axis][::-1]
    axes = []
    for size in shape_of(eqn.outvars[0]):
        axis, missing = [], size
        while missing > 1:
            factor = rest.pop()
            if missing % factor.size and factor.size % missing == 0 and factor.kind in ("same", "array"):
                rest.append(Factor(factor.kind, factor.size // missing))
                factor = Factor(factor.kind, missing)
            if missing % factor.size:
                kinds = {x.kind for x in (factor, *rest) if x.kind in _PAIRS}
                if kinds:
                    raise RefusedError(
                        f"mixes {' and '.join(sorted(kinds))} by a reshape to {shape_of(eqn.outvars[0])}"
                    )
                return [_of_array(eqn.outvars[0].aval)]
            axis.append(factor)
            missing //= factor.size
        axes.append(tuple(axis))
    return [Value(tuple(axes), inputs[0].steps)]


def _squeeze(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    gone = set(eqn.params["dimensions"])
    return [Value(tuple(x for i, x in enumerate(inputs[0].axes) if i not in gone), inputs[0].steps)]


def _expand_dims(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    rest, new = iter(inputs[0].axes), set(eqn.params["dimensions"])
    return [Value(tuple(() if i in new else next(rest) for i in range(len(shape_of(eqn.outvars[0])))), inputs[0].steps)]


def _transpose(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    return [Value(tuple(inputs[0].axes[i] for i in eqn.params["permutation"]), inputs[0].steps)]


def _reduce(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    operand, gone = _join(eqn, inputs), set(eqn.params["axes"])
    for axis in gone:
        _mixed(eqn, operand.axes[axis])
    kept = tuple(x for i, x in enumerate(operand.axes) if i not in gone)
    return [Value(kept, operand.steps)] * len(eqn.outvars)


def _along(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    """The rule of operations along one axis; each result may depend on all elements of the axis."""
    along, operand = _axis_along(eqn), _join(eqn, inputs)
    _mixed(eqn, operand.axes[along])
    results = []
    for var in eqn.outvars:
        axes = list(operand.axes)
        axes[along] = _axis("array", shape_of(var)[along])
        results.append(Value(tuple(axes), operand.steps))
    return results


def _axis_along(eqn: JaxprEqn) -> int:
    """The axis of an operation of `_along`; the name of the parameter differs by operation."""
    return next(int(eqn.params[name]) for name in ("dimension", "axis", "operand_axis") if name in eqn.params)


def _reorder(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    """The rule of operations that cut, pad, join and reverse: no element may move along an axis of the pairs."""
    operand = _join(eqn, (_without_joined(value, eqn) for value in inputs))
    outputs = []
    for var in eqn.outvars:
        axes = []
        for i, size in enumerate(shape_of(var)):
            axis = operand.axes[i]
            moves = _moves(eqn, i, size, _size(axis))
            if moves:
                _mixed(eqn, axis)
            same = all(factor.kind == "same" for factor in axis) and eqn.primitive.name in ("slice", "rev", "split")
            axes.append((_axis("same", size) if same else _axis("array", size)) if moves else axis)
        outputs.append(Value(tuple(axes), operand.steps))
    return outputs


def _without_joined(value: Value, eqn: JaxprEqn) -> Value:
    """The operand without the axis that `concatenate` joins: the size of that axis differs by operand."""
    if eqn.primitive.name != "concatenate":
        return value
    along = eqn.params["dimension"]
    _mixed(eqn, value.axes[along])
    return value._replace(axes=(*value.axes[:along], (), *value.axes[along + 1 :]))


def _moves(eqn: JaxprEqn, axis: int, new: int, old: int) -> bool:
    """Whether an equation of `_reorder` moves elements along an axis of size `old` before and `new` after."""
    match eqn.primitive.name:
        case "concatenate":
            return bool(axis == eqn.params["dimension"])
        case "rev":
            return axis in eqn.params["dimensions"]
        case "pad":
            return tuple(eqn.params["padding_config"][axis]) != (0, 0, 0)
        case _:
            return new != old


def _stack(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    joined, at = _join(eqn, inputs), eqn.params["axis"]
    return [joined._replace(axes=(*joined.axes[:at], _axis("array", len(inputs)), *joined.axes[at:]))]


def _unstack(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    (operand,), at = inputs, eqn.params["axis"]
    _mixed(eqn, operand.axes[at])
    return [operand._replace(axes=(*operand.axes[:at], *operand.axes[at + 1 :]))] * len(eqn.outvars)


def _tile(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    (operand,), reps = inputs, eqn.params["reps"]
    return [operand._replace(axes=tuple((*_axis("same", n), *x) for n, x in zip(reps, operand.axes, strict=True)))]


def _dynamic_slice(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    operand, *start = inputs
    axes = []
    for axis, size in zip(operand.axes, eqn.params["slice_sizes"], strict=True):
        if size != _size(axis):
            _mixed(eqn, axis)
        axes.append(axis if size == _size(axis) else _axis("array", size))
    return [Value(tuple(axes), operand.steps.union(*(x.steps for x in start)))]


def _dynamic_update_slice(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    operand, update, *_ = inputs
    axes = []
    for old, new in zip(operand.axes, update.axes, strict=True):
        if _size(old) == _size(new):
            axes.append(_join_axes(eqn, (old, new)))
        else:
            _mixed(eqn, old)
            _mixed(eqn, new)
            axes.append(_axis("array", _size(old)))
    return [Value(tuple(axes), frozenset().union(*(x.steps for x in inputs)))]


def _gather(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    (operand, indices), numbers = inputs, eqn.params["dimension_numbers"]
    _mixed(eqn, indices.axes[-1])
    of_indices = list(indices.axes[:-1])
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    for mine, other in batching.items():
        of_indices[mine] = _join_axes(eqn, (of_indices[mine], operand.axes[other]))
    window, taken = [], {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for i, (axis, size) in enumerate(zip(operand.axes, eqn.params["slice_sizes"], strict=True)):
        whole = size == _size(axis) and (i not in numbers.start_index_map or size == 1)
        if not whole and i not in numbers.operand_batching_dims:
            _mixed(eqn, axis)
        if i not in taken:
            window.append(axis if whole else _axis("array", size))
    rank, of_window, rest = len(shape_of(eqn.outvars[0])), iter(window), iter(of_indices)
    axes = (next(of_window) if i in numbers.offset_dims else next(rest) for i in range(rank))
    return [Value(tuple(axes), operand.steps | indices.steps)]


def _scatter(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    """The rule of scatters: indices must not depend on the pairs; the update may, along axes that are not indexed."""
    (operand, indices, update), numbers = inputs, eqn.params["dimension_numbers"]
    for axis in indices.axes:
        _mixed(eqn, axis)
    of_window = iter(numbers.update_window_dims)
    for i, axis in enumerate(update.axes):
        if i not in numbers.update_window_dims:
            _mixed(eqn, axis)
    axes = []
    for i, axis in enumerate(operand.axes):
        inserted = i in numbers.inserted_window_dims or i in numbers.operand_batching_dims
        new = () if inserted else update.axes[next(of_window)]
        if _size(new) == _size(axis) and i not in numbers.scatter_dims_to_operand_dims:
            axes.append(_join_axes(eqn, (axis, new)))
        else:
            _mixed(eqn, axis)
            _mixed(eqn, new)
            axes.append(axis)
    return [Value(tuple(axes), frozenset().union(*(x.steps for x in inputs)))]


def _dot_general(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    left, right = inputs
    contracted, batched = eqn.params["dimension_numbers"]
    for value, axes in zip(inputs, contracted, strict=True):
        for axis in axes:
            _mixed(eqn, value.axes[axis])
    shared = [_join_axes(eqn, (left.axes[i], right.axes[j])) for i, j in zip(*batched, strict=True)]
    free = [
        axis
        for value, *gone in zip(inputs, contracted, batched, strict=True)
        for i, axis in enumerate(value.axes)
        if i not in (*gone[0], *gone[1])
    ]
    return [Value((*shared, *free), left.steps | right.steps)]


def _iota(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    shape, along = eqn.params["shape"], eqn.params["dimension"]
    return [Value(tuple(_axis("array" if i == along else "same", size) for i, size in enumerate(shape)))]


def _random_bits(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    """The rule of `random_bits`, `random_split` and `random_unwrap`: new axes follow the axes of the keys."""
    shape = shape_of(eqn.outvars[0])[len(inputs[0].axes) :]
    return [Value((*inputs[0].axes, *(_axis("array", size) for size in shape)), inputs[0].steps)]


def _random_wrap(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    _mixed(eqn, inputs[0].axes[-1])
    return [Value(inputs[0].axes[:-1], inputs[0].steps)]


def _cond(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    index, *operands = inputs
    results = [_follow_call(branch, operands) for branch in eqn.params["branches"]]
    return [_join(eqn, (*outs, Value((), index.steps))) for outs in zip(*results, strict=True)]


def _while(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    count = eqn.params["cond_nconsts"]
    of_cond, rest = inputs[:count], inputs[count:]
    of_body, carry = rest[: eqn.params["body_nconsts"]], rest[eqn.params["body_nconsts"] :]

    def step(carry: Sequence[Value]) -> list[Value]:
        (going,) = _follow_call(eqn.params["cond_jaxpr"], (*of_cond, *carry))
        # Under `vmap` each element has its own condition. Its axes come first in every carried value.
        return [
            _join(eqn, (value, Value((*going.axes, *value.axes[len(going.axes) :]), going.steps)))
            for value in _follow_call(eqn.params["body_jaxpr"], (*of_body, *carry))
        ]

    return _until_stable(eqn, step, carry)


def _scan(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    params, length = eqn.params, eqn.params["length"]
    consts, carry, xs = _parts_of_scan(eqn, inputs)
    loops = {axis: Loop() for axis in (x.axes[0] for x in xs) if any(f.kind in _PAIRS for f in axis)}
    inner, moved = getattr(params["jaxpr"], "jaxpr", params["jaxpr"]), range(len(consts), len(consts) + len(carry))
    if any(inner.invars[i] is not inner.outvars[i - len(consts)] for i in moved):
        for axis in loops:
            _mixed(eqn, axis)
    slices = [Value(x.axes[1:], x.steps | ({loops[x.axes[0]]} if x.axes[0] in loops else set())) for x in xs]
    ys: list[Value] = []

    def step(carry: Sequence[Value]) -> list[Value]:
        results = _follow_call(params["jaxpr"], (*consts, *carry, *slices))
        ys[:] = results[len(carry) :]
        return results[: len(carry)]

    carried = _until_stable(eqn, step, carry)
    stacked = []
    for y in ys:
        over = [axis for axis, loop in loops.items() if loop in y.steps]
        lead = _join_axes(eqn, over) if over else _axis("array", length)
        stacked.append(Value((lead, *y.axes), y.steps - set(loops.values())))
    return [*carried, *stacked]


def _parts_of_scan(eqn: JaxprEqn, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(constants, carry, arrays to scan over)."""
    if "ft_in" in eqn.params:  # JAX 0.12
        consts, carry, xs = map(list, eqn.params["ft_in"].update(inputs).unpack())
        return consts, carry, xs
    first = eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    return list(inputs[:first]), list(inputs[first:last]), list(inputs[last:])


class Loop:
    """A loop over an axis of the pairs, without a carry. A loop equals only itself."""


def _until_stable(eqn: JaxprEqn, step: Callable[[Sequence[Value]], list[Value]], carry: Sequence[Value]) -> list[Value]:
    """The axes of the values that a loop carries, for any number of steps."""
    known = list(carry)
    while True:
        joined = [_join(eqn, pair) for pair in zip(known, step(known), strict=True)]
        if joined == known:
            return known
        known = joined


_RULES: dict[str, Rule] = {
    "argmax": _reduce,
    "argmin": _reduce,
    "broadcast_in_dim": _broadcast,
    "concatenate": _reorder,
    "cond": _cond,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "iota": _iota,
    "pad": _reorder,
    "random_bits": _random_bits,
    "random_split": _random_bits,
    "random_unwrap": _random_bits,
    "random_wrap": _random_wrap,
    "reshape": _reshape,
    "rev": _reorder,
    "scan": _scan,
    "slice": _reorder,
    "sort": _along,
    "split": _reorder,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _along,
    "transpose": _transpose,
    "unstack": _unstack,
    "while": _while,
}
_RULES |= dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along)
_RULES |= dict.fromkeys((f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")), _reduce)
_RULES |= dict.fromkeys(
    ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"), _scatter
)


def sizes_mixed(eqn: JaxprEqn) -> tuple[Any, ...]:
    """The sizes of the axes that an equation mixes; the result may depend on these sizes.

    `check_program` refuses axes of the pairs before. Arrays of equal values remain: the sum over an axis "same" tells
    the length of that axis.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [shape_of(var) for var in eqn.invars]
    if name == "iota":
        return (shape_of(eqn.outvars[0])[params["dimension"]],)
    if name == "scan":
        _, carry, _ = _parts_of_scan(eqn, eqn.invars)
        return (params["length"],) if carry else ()
    if name == "dot_general":
        return tuple(shapes[0][axis] for axis in params["dimension_numbers"][0][0])
    if name in ("gather", "dynamic_slice"):
        batched = params["dimension_numbers"].operand_batching_dims if name == "gather" else ()
        sizes = enumerate(zip(shapes[0], params["slice_sizes"], strict=True))
        return tuple(size for axis, (size, kept) in sizes if size != kept and axis not in batched)
    rule = _RULES.get(name)
    if rule is _reduce:
        return tuple(shapes[0][axis] for axis in params["axes"])
    if rule is _along:
        return (shapes[0][_axis_along(eqn)],)
    known = rule is not None or name in ELEMENTWISE or name in _CALLS or name == "call_hi_primitive"
    return () if known else tuple(shapes)


def inner_programs(param: Any) -> list[Any]:
    parts = param if isinstance(param, tuple | list) else (param,)
    return [getattr(part, "jaxpr", part) for part in parts if hasattr(part, "jaxpr") or isinstance(part, Jaxpr)]
