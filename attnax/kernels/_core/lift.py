"""Lifting turns the arrays that a user's function captures into operands with gradients.

A score mod or mask may close over arrays: parameters, document ids, values of an enclosing `grad`, `vmap` or
`shard_map`. A hand-written backward pass sees only its operands, so `lift` traces the function once. Work on captured
arrays alone is done at once, under ordinary differentiation. All other work is a program that runs for each tile. The
captured values that the program needs are its operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Var

from attnax.checks import wide_dtype
from attnax.kernels._core import natural
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.programs import (
    Program,
    inline,
    is_float,
    is_narrow,
    needed_for,
    read,
    shape_of,
    step,
    structure_of,
    without_mesh,
)
from attnax.pytrees import is_own, pytree_dataclass
from attnax.typing import Array

__all__ = ["Deferred", "Lifted", "defer", "lift", "lift_marked", "lift_traced", "sum_in_float32"]


@pytree_dataclass
class Lifted:
    """A traced function and its captured values.

    Attributes:
        values: the captured arrays that tiles need.
        program: the code that runs for each tile.
        refusal: the reason why the program runs only at the shapes of its trace; None if any shapes that broadcast are
            allowed. The result then has the broadcast shape, or a shape that broadcasts to it.
    """

    values: tuple[Array, ...]
    program: Program = dataclasses.field(metadata={"static": True})
    refusal: str | None = dataclasses.field(metadata={"static": True})

    def __call__(self, *arguments: Any) -> Any:
        """The function's result: one array, or a tuple of several."""
        return self._run(self.values, arguments, {})

    @property
    def floats(self) -> tuple[Array, ...]:
        """The values that get gradients."""
        return tuple(x for x in self.values if is_float(x))

    def gradients(self) -> tuple[Array, ...]:
        """Zeros for the sums of the gradients of `floats`, float32 or wider because many tiles are added."""
        return tuple(vary(jnp.zeros(x.shape, wide_dtype(x.dtype)), varying_axes(x)) for x in self.floats)

    def finish(self, gradients: Sequence[Array]) -> tuple[Array, ...]:
        """The accumulated gradients in the dtypes of `floats`."""
        return tuple(total.astype(x.dtype) for total, x in zip(gradients, self.floats, strict=True))

    def differentiate(self, scores: Array, *indices: Array) -> tuple[Array, Callable[..., Any]]:
        """The result for arguments (scores, *indices), and its pullback.

        The pullback takes the cotangent of the result and the accumulated gradients. It returns the gradient of the
        scores, and the accumulated gradients plus the share of this tile. If the function reads a captured array by
        index, the share is scattered into the sum: the cost follows the elements read, not the size of the array.
        """
        arguments = (scores, *indices)
        reads = self._reads(arguments)
        read_outside = {
            var for eqn in self.program.equations if id(eqn) not in reads for var in eqn.invars if isinstance(var, Var)
        } | {var for var in self.program.results if isinstance(var, Var)}
        floats = [i for i, x in enumerate(self.values) if is_float(x)]
        direct = [i for i in floats if self.program.captured[i] in read_outside]

        def run(scores: Array, given: list[Array], read: list[Array]) -> Array:
            values = list(self.values)
            for i, x in zip(direct, given, strict=True):
                values[i] = x
            modified = self._run(values, (scores, *indices), dict(zip(reads, read, strict=True)))
            return jnp.broadcast_to(modified, scores.shape)  # smaller if the result does not depend on the scores

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
        """By equation, the reads of floating captured arrays at indices that do not depend on the scores."""
        program, reads = self.program, {}
        position = {var: i for i, var in enumerate(program.captured) if is_float(self.values[i])}
        tainted = {program.arguments[0]}
        env = dict(zip((*program.captured, *program.arguments), (*self.values, *arguments), strict=True))
        for eqn in program.equations:
            if any(isinstance(var, Var) and var in tainted for var in eqn.invars) or eqn.effects:
                tainted.update(eqn.outvars)
                continue
            where = self._step(eqn, env, {})
            source = eqn.invars[0] if eqn.primitive.name in ("gather", "dynamic_slice") else None
            if isinstance(source, Var) and source in position:
                reads[id(eqn)] = env[eqn.outvars[0]], position[source], eqn, where
        return reads

    def _run(self, values: Sequence[Array], arguments: tuple[Array, ...], known: dict[int, Array]) -> Any:
        program = self.program
        env = dict(zip((*program.captured, *program.arguments), (*values, *arguments), strict=True))
        for eqn in program.equations:
            self._step(eqn, env, known)
        results = tuple(jnp.asarray(read(env, var), var.aval.dtype) for var in program.results)
        return results[0] if len(results) == 1 else results

    def _step(self, eqn: JaxprEqn, env: dict[Var, Any], known: dict[int, Array]) -> list[Any]:
        """Runs an equation unless the result is known; for a read by index, returns the indices."""
        if id(eqn) in known:
            env[eqn.outvars[0]] = known[id(eqn)]
            return []
        if self.refusal is not None:
            step(eqn, env)
            return [read(env, var) for var in eqn.invars[1:]]
        where = []

        def gather(eqn: JaxprEqn, index: tuple[Any, ...]) -> Array:
            elements, at = natural.gather(read(env, eqn.invars[0]), eqn, index)
            where.append(at)
            return elements

        natural.evaluate([eqn], env, self.program.rules, gather)
        return where


def lift(function: Callable[..., Any], *arguments: Any) -> Lifted:
    """`function` traced at the shapes, dtypes and varying axes of `arguments`; captured arrays become operands.

    Args:
        function: takes arrays like `arguments`, returns an array or a tuple of arrays.
        arguments: arrays, or their shapes as `jax.ShapeDtypeStruct`; values do not matter.
    """
    return lift_traced(jax.make_jaxpr(function)(*arguments), arguments)


def lift_marked(function: Callable[..., Any], *, scores: Any = None) -> Lifted:
    """Lifts a function of (b, h, q, kv), after scores if `scores` is a dtype, for any shapes if possible."""
    arguments = natural.examples(scores)
    return lift_traced(jax.make_jaxpr(function)(*arguments), arguments, marked=True)


def lift_traced(traced: Any, arguments: Sequence[Any], *, marked: bool = False) -> Lifted:
    """Lifts a traced program; `marked` arguments have the sizes `natural.MARKS`."""
    # Calls are inlined: work inside a call on captured arrays alone is then done here.
    flat = jax.make_jaxpr(lambda captured, *rest: inline(traced.jaxpr, captured, rest))(traced.consts, *arguments)
    count = len(traced.consts)
    inner = flat.jaxpr.invars[count:]
    known = dict(zip((*flat.jaxpr.constvars, *flat.jaxpr.invars[:count]), (*flat.consts, *traced.consts), strict=True))
    constant: dict[Var, JaxprEqn] = {}  # from literals alone: cheap to repeat, large to keep
    rest = []
    for eqn in flat.jaxpr.eqns:
        variables = [var for var in eqn.invars if isinstance(var, Var)]
        is_known = not eqn.effects and all(var in known or var in constant for var in variables)
        if not is_known or (marked and _spreads(eqn)):
            rest.append(without_mesh(eqn))
        elif any(var in known for var in variables):
            step(eqn, known, constant)
        else:
            rest.append(without_mesh(eqn))
            constant.update(dict.fromkeys(eqn.outvars, eqn))
    rest = needed_for(rest, flat.jaxpr.outvars, effects=True)
    used = [*(var for eqn in rest for var in eqn.invars), *flat.jaxpr.outvars]
    cut = tuple(dict.fromkeys(var for var in used if isinstance(var, Var) and var in known and var not in constant))
    results = tuple(flat.jaxpr.outvars)
    program = Program(cut, tuple(inner), tuple(rest), results, structure_of(cut, inner, rest, results))
    values = tuple(jnp.asarray(known[var]) for var in cut)
    refusal: str | None = "it was traced at one shape"
    if marked:
        refusal = natural.why_not_natural(program)
        if refusal is not None:  # kernels accept fewer programs: give their reason
            refusal = natural.why_not_natural(program, natural.GPU_ELEMENTWISE)
    return Lifted(values, program, refusal)


def _spreads(eqn: JaxprEqn) -> bool:
    """Whether an equation broadcasts values along an axis of a marked size."""
    have, made = ({size for var in variables for size in shape_of(var)} for variables in (eqn.invars, eqn.outvars))
    return bool((made - have) & {*natural.MARKS})


@pytree_dataclass
class Deferred:
    """A mask or score mod of Attnax, traced when a program is lowered for a platform that needs the trace.

    Its arrays are operands until then. A user's function is lifted at once: the function may read values of an
    enclosing transformation, and these values no longer exist when a program is lowered.

    Attributes:
        arrays: the leaves that are arrays.
        rest: the tree structure, and the leaves with None in place of each array.
    """

    arrays: tuple[Array, ...]
    rest: tuple[Any, tuple[Any, ...]] = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Any:
        """The mask or score mod."""
        structure, leaves = self.rest
        arrays = iter(self.arrays)
        return jax.tree.unflatten(structure, [next(arrays) if leaf is None else leaf for leaf in leaves])


def defer(function: Any) -> Deferred | None:
    """The function as a Deferred; None if a part of the function is not from Attnax."""
    if not is_own(function):
        return None
    leaves, structure = jax.tree.flatten(function)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = tuple(jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array)
    return Deferred(
        arrays, (structure, tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)))
    )


def sum_in_float32(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; gradients of captured float16 and bfloat16 arrays are summed in float32."""
    try:
        traced = jax.make_jaxpr(function)(*arguments)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return function(*arguments)  # the function needs values, which exist only outside of jit
    if not any(is_narrow(jnp.result_type(x)) for x in traced.consts):
        return function(*arguments)
    (result,) = inline(traced.jaxpr, traced.consts, arguments)
    return result


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
