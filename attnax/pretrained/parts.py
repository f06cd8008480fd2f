"""The parts of a model that its config does not describe: a folder would lose them, and compute something else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from flax import nnx

from attnax.config import BlockConfig
from attnax.kernels.flash import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.kernels.standard import standard_attention
from attnax.nn._parts import find_parts, name_of
from attnax.nn.dropout import Dropout
from attnax.nn.linear import ShapesOnly

__all__ = ["changed_parts", "foreign_parts"]

_EXACT = (standard_attention, memory_efficient_attention, flash_attention, pallas_flash_attention)
_TILES = {"block_size", "block_q", "block_kv"}  # of a kernel, which change no result
_WITHOUT_EFFECT = {"dtype", "param_dtype", "loaded_as", "deterministic"}
_OF_PROGRAMS = {"dtype", "param_dtype", "scan_layers", "remat"}  # fields of a config


def foreign_parts(model: Any) -> Iterator[str]:
    """One sentence for each class and function of a user in a model, with the first place that has it."""
    places: dict[str, str] = {}
    for where, part in find_parts(model).items():
        if where:  # the class of the model itself is another question
            places.setdefault(name_of(part), where)
    for name, where in places.items():
        yield f"{where} must be of Attnax, since config.json holds no code; got {name}."


def changed_parts(model: Any) -> Iterator[str]:
    """One sentence for each module, function and option in a model that is not what its config makes."""
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
    """Whether an attribute of a module is a function or an option; modules and parameters are compared elsewhere."""
    if isinstance(value, nnx.Module | nnx.Variable):
        return False
    return callable(value) or isinstance(value, int | float | str | BlockConfig)


def _is_same(value: Any, wanted: Any) -> bool:
    if isinstance(value, nnx.Module) and isinstance(wanted, nnx.Module):
        return True
    if isinstance(value, BlockConfig) and isinstance(wanted, BlockConfig):
        return not _different(value, wanted)
    kernels = [_kernel(function) for function in (value, wanted)]
    return value is wanted or bool(value == wanted) or None not in kernels


def _kernel(function: Any) -> Any:
    """The exact kernel in a function, which may choose the tiles of the kernel; None for anything else."""
    if isinstance(function, functools.partial):
        function = function.func if not function.args and function.keywords.keys() <= _TILES else None
    return function if function in _EXACT else None


def _different(one: BlockConfig, other: BlockConfig) -> dict[str, list[Any]]:
    """The values of each field in which two configs differ."""
    names = dict.fromkeys(field.name for config in (one, other) for field in dataclasses.fields(config))
    pairs = {name: [getattr(config, name, None) for config in (one, other)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in _OF_PROGRAMS}


def _sentence(where: str, wanted: Any, got: Any) -> str:
    if isinstance(wanted, BlockConfig) and isinstance(got, BlockConfig):
        name, (value, want) = next(iter(_different(got, wanted).items()))
        return _sentence(f"{where}.{name}", want, value)
    words = [name_of(part) if callable(part) else repr(part) for part in (wanted, got)]
    another = "another " if words[0] == words[1] else ""
    return f"{where} must be what the config makes, {words[0]}; got {another}{words[1]}, which has no place in it."
