"""Finds functions of users that could read the sizes of their arguments, by names and instructions in the code.

A tile has sizes of its own. A function that reads a size is traced at several sizes, and the programs are compared.
Most functions name nothing that tells a size; one trace then shows all their operations. A value that cannot be
inspected counts as telling a size.
"""

from __future__ import annotations

import builtins
import collections
import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

__all__ = ["could_read_sizes"]

# fmt: off
# Attributes and functions that tell a size, iterate over an axis, or can reach any value.
_TELLING = frozenset((
    "__array_interface__", "__getattribute__", "__iter__", "__len__", "__repr__", "__str__", "all", "any", "aval",
    "axis_size", "compile", "dict", "enumerate", "eval", "eval_shape", "exec", "filter", "format", "getattr",
    "hasattr", "iter", "itemsize", "len", "linearize", "list", "make_jaxpr", "map", "max", "min", "nbytes", "next",
    "psum", "repr", "reversed", "set", "shape", "size", "sorted", "str", "sum", "tuple", "typeof", "vars", "zip",
))
# Instructions that iterate, print or build a class.
_TELLING_INSTRUCTIONS = (
    "FORMAT_", "FOR_ITER", "GET_ITER", "MATCH_", "UNPACK_", "LOAD_FROM_DICT", "LOAD_BUILD_CLASS", "CONVERT_VALUE",
)
# A size that functions of these packages use shows in the program: as an iota, a reduced axis or a number.
_KNOWN = frozenset((
    "attnax", "builtins", "collections", "dataclasses", "enum", "flax", "functools", "jax", "jaxlib", "jaxtyping",
    "math", "numpy", "time", "typing",
))
# fmt: on
_CONTAINERS = (tuple, list, set, frozenset, dict, collections.deque)
_CONSTANTS = (jax.Array, np.ndarray, np.generic)
_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), slice)
_NOT_CALLED = frozenset(("__init__", "__post_init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"))
_HELD: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset"),
    functools.cached_property: ("func",),
}
_MOST = 1000  # values to look into


class TellingError(Exception):
    """A name or an instruction tells a size, or a value cannot be inspected."""


def could_read_sizes(function: Any) -> bool:
    """Whether a function, or a value that the function can reach, names a size or cannot be inspected."""
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
        TellingError: the value names a size, or cannot be inspected.
    """
    kind = type(x)
    if isinstance(x, _CONSTANTS) or kind in _PLAIN:
        return ()
    if kind in _CONTAINERS or (isinstance(x, _CONTAINERS) and _is_known(kind)):
        return x.values() if isinstance(x, dict) else tuple(x)
    if kind is types.FunctionType:
        return _of_function(x)
    if kind in _HELD:
        return [getattr(x, name) for name in _HELD[kind]]
    if kind is types.BuiltinFunctionType:
        if not _is_known(x) or x.__name__ in _TELLING:
            raise TellingError
        return ()
    if isinstance(x, type):
        if x.__module__ == "builtins" and x.__name__ in _TELLING:
            raise TellingError
        return () if _is_known(x) else [y for base in x.__mro__ if not _is_known(base) for y in _members(base)]
    if isinstance(x, functools.partial) and _is_known(kind):
        return x.func, x.args, x.keywords
    if kind.__name__ == "PjitFunction" and _is_known(kind):  # that of `jax.jit`
        return (x.__wrapped__,)
    if isinstance(x, (*_CONTAINERS, types.ModuleType)) or not _has_plain_attributes(kind):
        raise TellingError
    try:
        held = list(object.__getattribute__(x, "__dict__").values())  # no method of a user's class runs
    except AttributeError:
        held = []
    if _is_known(kind):
        return held
    if kind.__dictoffset__ == 0:
        raise TellingError
    return kind, *held


def _of_function(x: types.FunctionType) -> Iterable[Any]:
    cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
    if _is_known(x):
        return cells
    held = (value for name, value in vars(x).items() if name != "__wrapped__")
    return *cells, x.__defaults__, x.__kwdefaults__, *held, *_named(x.__code__, x.__globals__)


def _named(code: types.CodeType, module: dict[str, Any]) -> Iterator[Any]:
    """The values of the names in the code of a function and of its inner functions."""
    if code.co_exceptiontable or set(code.co_names) & _TELLING:  # code may catch an error that a size caused
        raise TellingError
    attributes = set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname.startswith(_TELLING_INSTRUCTIONS):
            raise TellingError
        if step.opname == "IMPORT_NAME" and str(step.argval).split(".")[0] not in _KNOWN:
            raise TellingError
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            name = step.argval
            if name not in module and not hasattr(builtins, name):
                raise TellingError
            value = module.get(name, getattr(builtins, name, None))
            if not isinstance(value, types.ModuleType):
                yield value
            elif value.__name__.split(".")[0] not in _KNOWN:
                found = [vars(value)[other] for other in attributes if other in vars(value)]
                if not found:
                    raise TellingError
                yield found
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _named(value, module)


def _members(kind: type) -> Iterator[Any]:
    """The members of a user's class that run when an object of the class is called or read."""
    for name, value in vars(kind).items():
        is_code = callable(value) or hasattr(type(value), "__get__")
        if (
            name not in _NOT_CALLED
            and is_code
            and type(value) not in (types.GetSetDescriptorType, types.MemberDescriptorType)
        ):
            yield value


def _has_plain_attributes(kind: type) -> bool:
    """Whether `vars` shows all that an object of a class holds."""
    bases = [base for base in kind.__mro__ if not _is_known(base)]
    return not any("__slots__" in vars(base) or "__getattr__" in vars(base) for base in bases)


def _is_known(x: Any) -> bool:
    """Whether a function or class is of a package in `_KNOWN`."""
    return (getattr(x, "__module__", None) or "").split(".")[0] in _KNOWN
