"""The parts of a model that its config does not describe: a folder would lose them, and compute something else."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from flax import nnx

from attnax.kernels.flash import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.kernels.standard import standard_attention
from attnax.nn._parts import find_parts, name_of
from attnax.nn.dropout import Dropout
from attnax.nn.linear import ShapesOnly

__all__ = ["changed_parts", "foreign_parts"]

_EXACT = (standard_attention, memory_efficient_attention, flash_attention, pallas_flash_attention)
_TILES = {"block_size", "block_q", "block_kv"}  # of a kernel, which change no result
_WITHOUT_EFFECT = {"dtype", "param_dtype", "loaded_as"}


def foreign_parts(model: Any) -> Iterator[str]:
    """One sentence for each class and function of a user in a model, with the first place that has it."""
    places: dict[str, str] = {}
    for where, part in find_parts(model).items():
        if where:  # the class of the model itself is another question
            places.setdefault(name_of(part), where)
    for name, where in places.items():
        yield f"{where} must be of Attnax, since config.json holds no code; got {name}."


def changed_parts(model: Any) -> Iterator[str]:
    """One sentence for each module, function and number in a model that is not what its config makes."""
    fresh = nnx.eval_shape(lambda: type(model)(ShapesOnly(0), model.config))
    made = {path: part for path, part in nnx.iter_modules(fresh) if not isinstance(part, nnx.RngStream)}
    for path, part in nnx.iter_modules(model):
        if isinstance(part, Dropout | nnx.Rngs | nnx.RngStream):
            continue
        where, wanted = ".".join(map(str, path)), made.get(path)
        if type(part) is not type(wanted):
            yield _sentence(where, None if wanted is None else type(wanted), type(part))
        elif wanted is not None:
            for name in dict.fromkeys((*vars(wanted), *vars(part))):
                value, want = vars(part).get(name), vars(wanted).get(name)
                if name not in _WITHOUT_EFFECT and (_counts(value) or _counts(want)) and not _is_same(value, want):
                    yield _sentence(f"{where}.{name}".lstrip("."), want, value)


def _counts(value: Any) -> bool:
    """Whether an attribute of a module is a function or a number; modules and parameters are compared elsewhere."""
    if isinstance(value, nnx.Module | nnx.Variable | bool):
        return False
    return callable(value) or isinstance(value, int | float)


def _is_same(value: Any, wanted: Any) -> bool:
    if isinstance(value, nnx.Module) and isinstance(wanted, nnx.Module):
        return True
    kernels = [_kernel(function) for function in (value, wanted)]
    return value is wanted or bool(value == wanted) or None not in kernels


def _kernel(function: Any) -> Any:
    """The exact kernel in a function, which may choose the tiles of the kernel; None for anything else."""
    if isinstance(function, functools.partial):
        function = function.func if not function.args and function.keywords.keys() <= _TILES else None
    return function if function in _EXACT else None


def _sentence(where: str, wanted: Any, got: Any) -> str:
    words = [name_of(part) if callable(part) else repr(part) for part in (wanted, got)]
    another = "another " if words[0] == words[1] else ""
    return f"{where} must be what the config makes, {words[0]}; got {another}{words[1]}, which has no place in it."
