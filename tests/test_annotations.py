"""Annotations of arrays are checked: the import hook silently takes an annotation that it cannot evaluate for `Any`."""

import ast
import builtins
import functools
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import jaxtyping
import numpy as np

import attnax

KINDS = {"Bool": np.bool_, "Float": np.float32, "Int": np.int32, "Shaped": np.float32}
ARRAY = re.compile(rf"""\b({"|".join(KINDS)})\[(Array|ArrayLike), ["'](.*?)["']\]""")
ANY_NUMBER = ("*", "...")  # first characters of a word for any number of axes


@functools.cache
def modules():
    """All modules except the command line, which has no arrays and imports many packages."""
    names = [info.name for info in pkgutil.walk_packages(attnax.__path__, "attnax.")]
    return [importlib.import_module(name) for name in names if not re.search(r"\.(cli|__main__)\b", name)]


def array_types(tree):
    """The types such as `Float[Array, "B T"]` in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in KINDS:
            yield node


def array_annotations(tree):
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None and any(array_types(annotation)):
                yield annotation


def test_axes_are_quoted_and_other_names_of_an_annotation_are_defined_before():
    wrong, count = [], 0
    for module in modules():
        tree = ast.parse(Path(module.__file__).read_text())
        ends = {node.name: node.end_lineno for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        for annotation in array_annotations(tree):
            quoted = all(ARRAY.fullmatch(ast.unparse(node)) for node in array_types(annotation))
            names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} - set(vars(builtins))
            defined = all(hasattr(module, name) and ends.get(name, 0) < annotation.lineno for name in names)
            if not (quoted and defined):
                wrong.append(f"{module.__file__}:{annotation.lineno}: {ast.unparse(annotation)}")
            count += 1
    assert wrong == []
    assert count > 400


def public_functions():
    """(name, function) of modules and of their classes, without names that begin with an underscore."""
    for module in modules():
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) != module.__name__:
                continue
            for member in dir(thing) if inspect.isclass(thing) else [""]:
                function = inspect.getattr_static(thing, member) if member else thing
                function = getattr(function, "__func__", function)
                ours = callable(function) and str(getattr(function, "__module__", None)).startswith("attnax.")
                whole = f"{module.__name__}.{name}.{member}".removesuffix(".")
                rebuilt = member == "__init__" and hasattr(thing, "__no_type_check__")  # made by JAX, takes anything
                if ours and not rebuilt and not re.search(r"\._(?!_call__|_init__)", whole):
                    yield whole, function


def make_array(kind, of, axes, more=0, dtype=None):
    """Zeros of the type, of size 1 along each axis, with `more` axes than the type allows."""
    rank = sum(not axis.startswith(ANY_NUMBER) for axis in axes.split())
    array = np.zeros((1,) * (rank + more), dtype or KINDS[kind])
    return array if of == "ArrayLike" else jax.device_put(array)


def wrong_values(annotation):
    """Wrong values: an array with an axis too many, or of another dtype if any number of axes is allowed, or text."""
    options = ARRAY.findall(annotation)
    ranks = {(kind, len(axes.split())) for kind, _, axes in options}
    for kind, of, axes in options:
        if kind == "Shaped":
            yield "text"
        elif any(axis.startswith(ANY_NUMBER) for axis in axes.split()):
            yield make_array(kind, of, axes, dtype=np.complex64)
        elif (kind, len(axes.split()) + 1) not in ranks:
            yield make_array(kind, of, axes, more=1)


def stand_in(annotation, names):
    """A value that a check of the type accepts."""
    if found := ARRAY.search(annotation):
        return make_array(*found.groups())
    hint = eval(annotation, names)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if {typing.Any, types.NoneType} & set(options) or isinstance(hint, typing.TypeVar):
        return None
    kind = typing.get_origin(options[0]) or options[0]
    known = {int: 1, bool: True, str: "text", typing.SupportsIndex: 1, Callable: print}
    if kind in known:
        return known[kind]
    return tuple.__new__(kind, [None] * len(kind._fields)) if issubclass(kind, tuple) else object.__new__(kind)


def call_with(function, name, value):
    """Calls `function`, unbound, with `value` for `name`, and stand-ins for other required arguments."""
    arguments, keywords = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name == name:
            argument = value
        elif parameter.default is not parameter.empty:
            argument = parameter.default
        elif parameter.annotation is parameter.empty:
            argument = None  # self
        else:
            argument = stand_in(parameter.annotation, inspect.unwrap(function).__globals__)
        if parameter.kind == parameter.KEYWORD_ONLY:
            keywords[parameter.name] = argument
        else:
            arguments.append(argument)
    function(*arguments, **keywords)


def error_of(function, name, value):
    try:
        call_with(function, name, value)
    except jaxtyping.TypeCheckError as error:
        return str(error)
    return "nothing"


def test_every_public_function_refuses_an_array_with_an_axis_too_many():
    wrong, checked = {}, set()
    for whole, function in public_functions():
        for name, parameter in inspect.signature(function).parameters.items():
            for value in wrong_values(str(parameter.annotation)):
                said = error_of(function, name, value)
                if f"parameter '{name}'" not in said:
                    wrong[whole, name, np.shape(value)] = said
                checked.add(whole)
    assert wrong == {}
    assert len(checked) > 100


def test_every_public_function_is_among_the_checked_ones():
    found = {function for _, function in public_functions()}
    public = [module for module in (attnax, *modules()) if "._" not in module.__name__]
    named = [getattr(module, name) for module in public for name in getattr(module, "__all__", ())]
    assert set(filter(inspect.isfunction, named)) <= found
