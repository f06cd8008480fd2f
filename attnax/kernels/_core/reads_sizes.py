"""Whether a user's function could read the sizes of its arguments, by the names in its code.

A tile has sizes of its own. A function that reads a size has to be traced at several sizes, to see how its program
depends on it. Most functions name no size, and one trace is enough.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

__all__ = ["could_read_sizes"]

# fmt: off
_TELLING = frozenset((
    "__array_interface__", "__getattribute__", "__len__", "aval", "axis_size", "eval", "eval_shape", "exec", "getattr",
    "len", "make_jaxpr", "nbytes", "psum", "shape", "size", "typeof", "vars",
))
# fmt: on
# If functions of these packages use a size, the program shows it: an iota, a reduced axis, a number.
_KNOWN = frozenset(("attnax", "builtins", "flax", "functools", "jax", "jaxlib", "jaxtyping", "math", "numpy", "typing"))
_NOT_CALLED = frozenset(("__init__", "__post_init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"))
_MOST = 1000  # values to inspect


class TellingError(Exception):
    """A value tells a size, or cannot be inspected."""


def could_read_sizes(function: Any) -> bool:
    """Whether the code that a function can reach names a size, or cannot be inspected."""
    seen: dict[int, Any] = {}
    waiting = [function]
    while waiting and len(seen) < _MOST:
        x = waiting.pop()
        if id(x) not in seen:
            seen[id(x)] = x
            try:
                waiting += _reached_from(x)
            except TellingError:
                return True
    return bool(waiting)


def _reached_from(x: Any) -> Iterable[Any]:
    """The values that a value holds or can call.

    Raises:
        TellingError: it names something that tells a size, or cannot be inspected.
    """
    if isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex | str | bytes | type(None)):
        return ()
    if isinstance(x, tuple | list | set | frozenset):
        return x
    if isinstance(x, dict):
        return x.values()
    if isinstance(x, types.FunctionType) and not _is_known(x):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        return *cells, x.__defaults__, x.__kwdefaults__, *_named(x.__code__, x.__globals__)
    if isinstance(x, types.MethodType):
        return x.__func__, x.__self__
    if isinstance(x, functools.partial):
        return x.func, x.args, x.keywords
    if isinstance(x, staticmethod | classmethod) or hasattr(x, "__wrapped__"):  # as jit and custom_jvp leave it
        return (x.__wrapped__,)
    if isinstance(x, property):
        return (x.fget,)
    if isinstance(x, type):
        return () if _is_known(x) else [y for kind in x.__mro__ if not _is_known(kind) for y in _methods(kind)]
    if _is_known(x):
        if getattr(x, "__name__", "") in _TELLING:
            raise TellingError
        return () if callable(x) and not hasattr(type(x), "__dataclass_fields__") else _held(x)
    if callable(x) and isinstance(x, types.BuiltinFunctionType):
        raise TellingError
    return (type(x), *_held(x))


def _named(code: types.CodeType, module: dict[str, Any]) -> Iterator[Any]:
    """The values of the names in a function's code, and in the functions that it makes."""
    names = set(code.co_names)
    if names & _TELLING:
        raise TellingError
    for name in names:
        value = module.get(name, getattr(builtins, name, sys.modules.get(name)))
        if not isinstance(value, types.ModuleType):
            yield value
        elif value.__name__.split(".")[0] not in _KNOWN:
            yield [getattr(value, other) for other in names if hasattr(value, other)]
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _named(value, module)


def _methods(kind: type) -> list[Any]:
    return [value for name, value in vars(kind).items() if name not in _NOT_CALLED and callable(value)]


def _held(x: Any) -> Iterable[Any]:
    """The attributes of an object."""
    if not hasattr(x, "__dict__") and not _is_known(x):
        raise TellingError
    return list(getattr(x, "__dict__", {}).values())


def _is_known(x: Any) -> bool:
    """Whether a function or class, or the class of a value, is of a package in `_KNOWN`."""
    module = x.__module__ if isinstance(x, type | types.FunctionType) else type(x).__module__
    if isinstance(x, types.BuiltinFunctionType):
        module = x.__module__ or ""
    return (module or "").split(".")[0] in _KNOWN
