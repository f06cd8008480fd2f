"""Finds JAX arrays that a function reads and a module does not hold: such constants get no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.pytrees import is_own

__all__ = ["refuse_hidden_arrays", "refuse_hidden_arrays_of_kernel", "unchanged"]


def refuse_hidden_arrays(
    caller: str, name: str, function: Any, arguments: Sequence[Any], *, visible: Sequence[Any] = (), **options: Any
) -> None:
    """Raises ValueError for a function that reads a floating JAX array which is none of its leaves.

    NumPy arrays, integers and arrays that the function makes itself are allowed constants. A function that raises at
    these shapes passes, since it may hold an array of one fixed size.

    Args:
        caller: the class that keeps the function, for the message.
        name: the argument that holds the function, for the message.
        function: None, a function or a callable pytree. Functions of this library are not checked.
        arguments: shapes and dtypes to trace the function at.
        visible: arrays that the function may read beside its leaves.
        **options: keywords to call the function with.
    """
    if function is None or is_own(function):
        return
    own = {id(leaf) for leaf in (*_leaves(function), *visible)}
    hidden = [x for x in _floating_constants(function, arguments, options) if id(x) not in own]
    if hidden:  # in a second trace, an array that the function makes itself is another object
        again = {id(x): x for x in _floating_constants(function, arguments, options)}
        hidden = [x for x in hidden if id(x) in again]
    if hidden:
        raise _refusal(caller, name, function, hidden[0])


def refuse_hidden_arrays_of_kernel(
    caller: str, attention_fn: Any, arguments: Sequence[Any], scores: Sequence[Any]
) -> None:
    """`refuse_hidden_arrays` for an attention function; arrays that a partial binds count as hidden, except a `cache`.

    Args:
        caller: the class that keeps the function, for the message.
        attention_fn: an AttentionFn.
        arguments: shapes and dtypes of query, key and value to trace the function at.
        scores: shapes and dtypes to trace a score mod in the partial at.
    """
    kernel, visible = attention_fn, _leaves(attention_fn)
    while isinstance(kernel, functools.partial):
        for name, value in (dict(enumerate(kernel.args)) | kernel.keywords).items():
            arrays = _leaves(value)
            if name == "cache":
                visible = visible + arrays
            elif unseen := [x for x in arrays if _is_floating(x) and not any(x is leaf for leaf in visible)]:
                raise _refusal(caller, "attention_fn", attention_fn, unseen[0])
            if name == "score_mod":
                refuse_hidden_arrays(caller, "score_mod", value, scores)
        kernel = kernel.func
    if not str(getattr(kernel, "__module__", type(kernel).__module__)).startswith("attnax."):
        options = {"dropout_rng": None, "dropout_rate": 0.0, "deterministic": True, "mask": None, "score_mod": None}
        refuse_hidden_arrays(caller, "attention_fn", attention_fn, arguments, visible=visible, **options)


def unchanged(function: Any) -> Any:
    """A function for one trace: a module, or the module of a method, is a copy with the same arrays.

    What the module writes, such as the count of a dropout stream, stays in the trace.
    """
    if isinstance(function, nnx.Module):
        return nnx.clone(function)
    if isinstance(module := getattr(function, "__self__", None), nnx.Module):
        return getattr(unchanged(module), function.__name__)
    return function


def _refusal(caller: str, name: str, function: Any, array: Any) -> ValueError:
    instead = {"score_mod": ", or give it to the call", "attention_fn": ", and give a score mod as score_mod"}
    return ValueError(
        f"{caller}: {name} must not hide arrays, which get no gradient; got {name}="
        f"{getattr(function, '__qualname__', type(function).__name__)}, which reads {jax.typeof(array).str_short()} "
        "that is no leaf of it. Make it a registered dataclass or an nnx.Module that holds the array"
        f"{instead.get(name, '')}. A constant may be a NumPy array."
    )


def _leaves(function: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(function) if isinstance(function, nnx.Module) else function)


def _is_floating(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


def _floating_constants(function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The floating JAX arrays and tracers that a trace of the function captures; NumPy arrays do not count."""
    try:
        traced = jax.make_jaxpr(lambda *arguments: unchanged(function)(*arguments, **options))(*arguments)
    # The function was not made for these sizes, or not for this machine.
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
        return []
    found: list[Any] = []
    rest: list[Any] = [traced]
    while rest:
        program = rest.pop()
        found += getattr(program, "consts", ())
        for equation in program.eqns:
            found += [var.val for var in equation.invars if hasattr(var, "val")]
            rest += [x for x in jax.tree.leaves(list(equation.params.values())) if hasattr(x, "eqns")]
    return [x for x in found if _is_floating(x)]
