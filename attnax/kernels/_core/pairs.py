"""Tests whether a mask or score mod looks at one pair of query and key at a time. Only such a function runs in tiles.

A tile holds some rows of the batch, heads, queries and keys. A function that takes a row's maximum, rolls, or mixes
heads would see the values of a tile instead of the row. A function that reads the sizes of its arguments would see the
sizes of a tile. For most functions one trace, at sizes that no array has, excludes both. Otherwise the function is
traced at the true sizes and at two further sizes, and the traces are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from attnax.checks import apply_score_mod
from attnax.kernels._core.axis_flow import RefusedError, check_program, inner_programs, sizes_mixed
from attnax.kernels._core.lift import Lifted, lift_traced
from attnax.kernels._core.natural import ELEMENTWISE, MARKS, examples
from attnax.kernels._core.programs import needed_for, shape_of, trace_rule
from attnax.kernels._core.reads_sizes import could_read_sizes
from attnax.masks import Mask
from attnax.pytrees import is_own
from attnax.typing import ScoreMod

__all__ = ["MixedPairsError", "check_pairs", "lift_pairs", "lift_where_it_can"]


# The errors that a function may raise for arguments of unexpected sizes.
_OF_SIZES = TypeError, ValueError, LookupError, ArithmeticError, AssertionError


class MixedPairsError(NotImplementedError):
    """A mask or score mod that only `standard_attention` computes."""


def check_pairs(
    caller: str, mask: Mask | None, score_mod: ScoreMod | None, score_shape: tuple[int, ...], axes: frozenset[str]
) -> None:
    """Raises MixedPairsError if the mask or the score mod mixes pairs; see `lift_pairs`."""
    for function, scores in ((mask, None), (score_mod, jnp.float32)):
        if function is not None and not is_own(function):
            lift_pairs(caller, function, score_shape, axes, scores=scores)


def lift_pairs(
    caller: str, function: Any, score_shape: tuple[int, ...], axes: frozenset[str], *, scores: Any = None
) -> Lifted | str:
    """A mask or score mod lifted for arguments of any shapes, or the reason why the function is tied to its shapes.

    Args:
        caller: the kernel, for errors.
        function: a mask `(b, h, q, kv)`, or a score mod `(scores, b, h, q, kv)`.
        score_shape: (B, N, T, S).
        axes: mesh axes of an enclosing `shard_map` over which the arguments vary.
        scores: the dtype of the scores of a score mod; None for a mask.

    Raises:
        MixedPairsError: the function mixes pairs.
        ValueError: the result does not broadcast to the shape of the indices.
    """
    try:
        return _examine(caller, function, score_shape, axes, scores)
    except RefusedError as reason:
        raise MixedPairsError(
            f"{caller}: {'mask' if scores is None else 'score_mod'} must look at one pair of query and key at a time, "
            f"which is what lets it run tile by tile; this one {reason}. Index arrays by b, h, q and kv, or use "
            "standard_attention (AttentionType.STANDARD), which computes all scores at once."
        ) from reason


def _examine(
    caller: str, function: Any, score_shape: tuple[int, ...], axes: frozenset[str], scores: Any
) -> Lifted | str:
    """The result of `lift_pairs`; RefusedError if the function mixes pairs."""
    run = function if scores is None else partial(apply_score_mod, caller, function)
    if is_own(function) or 0 in score_shape:
        return lift_where_it_can(run, *examples(scores))[1]
    # A function that reads sizes may loop over them. Marked sizes are large, so smaller sizes come first.
    last = _compare(caller, run, score_shape, axes, scores) if could_read_sizes(function) else None
    traced, lifted = lift_where_it_can(run, *examples(scores))
    if last is None:
        if traced is not None and _is_of_pairs(traced, lifted, scores):
            return lifted
        last = _compare(caller, run, score_shape, axes, scores)
    if isinstance(lifted, str):
        return lifted
    try:
        if axes:  # the compared sizes were small, so a branch by size may be unseen
            raise RefusedError("may read the sizes of its arguments")
        _check_same(last, traced)
    except RefusedError as reason:  # at true sizes the function is allowed; it is traced again at those of a tile
        return f"it {reason}"
    return lifted


def lift_where_it_can(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Lifted | str]:
    """The trace of a function at marked sizes, and the function lifted for any shapes or the reason against it."""
    try:
        traced = jax.make_jaxpr(function)(*arguments)
    except _OF_SIZES as error:  # an error of another cause is raised again at true sizes
        return None, f"it works at the sizes of the call, and not at others ({error})"
    lifted = lift_traced(traced, arguments, marked=True)
    return traced, lifted if lifted.refusal is None else lifted.refusal


def _is_of_pairs(traced: Any, lifted: Lifted | str, scores: Any) -> bool:
    """Whether a program, traced at marked sizes, looks at one pair at a time and uses no marked size."""
    shapes = [*map(shape_of, traced.jaxpr.outvars)]
    if any(len(shape) > 4 for shape in shapes) or _shows_marks(traced):
        return False
    if isinstance(lifted, Lifted):  # a program that runs at any shapes looks at one pair
        return True
    try:
        check_program(traced, MARKS, scores is not None)
    except RefusedError:
        return False
    return all(have in (1, want) for shape in shapes for have, want in zip(shape[::-1], MARKS[::-1], strict=False))


def _shows_marks(traced: Any) -> bool:
    """Whether one of `MARKS` is a number in a program, or the size of an array or axis that the result needs."""
    shapes = [np.shape(x) for x in getattr(traced, "consts", ())]
    return _holds_mark(shapes) or _program_shows_marks(getattr(traced, "jaxpr", traced))


def _program_shows_marks(program: Jaxpr) -> bool:
    for eqn in needed_for(program.eqns, program.outvars):
        numbers = [var.val for var in eqn.invars if isinstance(var, Literal) and np.ndim(var.val) == 0]
        numbers += [x for key, x in eqn.params.items() if isinstance(x, int | float) and key != "length"]
        if _holds_mark((numbers, sizes_mixed(eqn))):
            return True
        inner = [program for param in eqn.params.values() for program in inner_programs(param)]
        if any(map(_program_shows_marks, [*inner, *_rule_of(eqn)])):
            return True
    return False


def _rule_of(eqn: JaxprEqn) -> list[Jaxpr]:
    """The custom derivative of a `jax.custom_jvp` function, as a program."""
    return [trace_rule(eqn).jaxpr] if eqn.primitive.name == "custom_jvp_call" else []


def _holds_mark(numbers: Any) -> bool:
    """Whether a number in nested sequences is one of `MARKS`."""
    if isinstance(numbers, tuple | list):
        return any(map(_holds_mark, numbers))
    return not isinstance(numbers, jax.core.Tracer) and numbers in MARKS


def _compare(
    caller: str, run: Callable[..., Any], score_shape: tuple[int, ...], axes: frozenset[str], scores: Any
) -> Any:
    """A program of the function at sizes other than the true sizes.

    Raises:
        RefusedError: the function mixes pairs, or depends on sizes.
        ValueError: as in `lift_pairs`.
    """

    def trace(sizes: tuple[int, ...]) -> Any:
        return jax.make_jaxpr(run)(*examples(scores, sizes, axes))

    if axes:  # in a `shard_map` the example arguments are arrays, so they are kept small
        score_shape = tuple(min(size, 256) for size in score_shape)
    try:
        programs = [trace(score_shape)]
    except TypeError as error:
        if not axes:
            raise
        raise RefusedError(
            f"does not work with {score_shape} scores, as many as are looked at in a shard_map ({error})"
        ) from error
    (shape,) = map(shape_of, programs[0].jaxpr.outvars)
    if len(shape) > 4 or any(have not in (1, want) for have, want in zip(shape[::-1], score_shape[::-1], strict=False)):
        raise ValueError(
            f"{caller}: a mask function must return booleans of the shape that its indices broadcast to; got {shape} "
            f"for indices of sizes {score_shape}. Index its arrays by b, h, q and kv, or pass an array as the mask."
        )
    check_program(programs[0], score_shape, scores is not None)
    # A tile has other sizes. Small sizes are for functions that test whether a size is large.
    for sizes in (tuple(size + 1 for size in score_shape), tuple(3 if size == 1 else 2 for size in score_shape)):
        try:
            programs.append(trace(sizes))
        except (TypeError, ValueError) as error:
            raise RefusedError(f"works with {score_shape} scores, and not with {sizes} ({error})") from error
        check_program(programs[-1], sizes, scores is not None)
    if 1 in score_shape:  # an axis of size 1 needs no broadcast, so this program differs
        del programs[0]
    for one, other in itertools.pairwise(programs):
        _check_same(one, other)
    return programs[-1]


def _check_same(one: Any, other: Any) -> None:
    """Raises RefusedError if two traces of a function, at different sizes, differ by more than these sizes."""
    for left, right in zip(one.consts, other.consts, strict=False):
        same = left is right or (np.shape(left) == np.shape(right) and _equal(left, right))
        if not same:
            raise RefusedError("makes its arrays by the sizes of its arguments, which are a tile's")
    _check_same_program(one.jaxpr, other.jaxpr)


def _check_same_program(one: Jaxpr, other: Jaxpr) -> None:
    by_size = RefusedError("reads the sizes of its arguments, which are a tile's")
    equations = needed_for(one.eqns, one.outvars), needed_for(other.eqns, other.outvars)
    if len(equations[0]) != len(equations[1]) or len(one.constvars) != len(other.constvars):
        raise by_size
    if not _same_numbers(one.outvars, other.outvars):
        raise by_size
    for left, right in zip(*equations, strict=True):
        name = left.primitive.name
        if name != right.primitive.name or len(left.invars) != len(right.invars):
            raise by_size
        if not _same_numbers(left.invars, right.invars):
            raise by_size
        same_shapes = [*map(shape_of, left.invars)] == [*map(shape_of, right.invars)]
        if sizes_mixed(left) != sizes_mixed(right):
            raise by_size
        for a, b in zip(_rule_of(left), _rule_of(right), strict=True):
            _check_same_program(a, b)
        for key in left.params:
            mine, other = left.params[key], right.params[key]
            for a, b in zip(inner_programs(mine), inner_programs(other), strict=True):
                _check_same_program(a, b)
            is_shape = isinstance(mine, tuple) or (name, key) == ("scan", "length")
            if is_shape and (list(inner_programs(mine)) or not (same_shapes or name in ELEMENTWISE)):
                continue  # follows the sizes
            is_number = isinstance(mine, int | float | tuple | np.dtype)
            if is_number and name != "broadcast_in_dim" and repr(mine) != repr(other):  # NaN is itself
                raise by_size


def _same_numbers(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists of variables have equal numbers at equal places."""
    return all(
        _equal(x.val, y.val) if isinstance(x, Literal) and isinstance(y, Literal) else type(x) is type(y)
        for x, y in zip(one, other, strict=True)
    )


def _equal(left: Any, right: Any) -> bool:
    """Whether two constants at the same place of two programs are equal; traced constants count as equal."""
    if left is right or isinstance(left, jax.core.Tracer) or isinstance(right, jax.core.Tracer):
        return True
    if any(jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended) for x in (left, right)):
        return True
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()  # of NaN too
