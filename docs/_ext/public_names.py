"""The public names of Attnax, and where each of them is documented."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

MODULES = (  # a name that several of them have is documented under the first
    "attnax",
    "attnax.config",
    "attnax.masks",
    "attnax.kernels",
    "attnax.kernels.score_mods",
    "attnax.cache",
    "attnax.paged_cache",
    "attnax.nn",
    "attnax.models",
    "attnax.generation",
    "attnax.text",
    "attnax.pretrained",
    "attnax.training",
    "attnax.sharding",
    "attnax.distributed",
    "attnax.launcher",
    "attnax.visualize",
    "attnax.reference",
    "attnax.errors",
    "attnax.typing",
)
ARRAY_TYPES = {"Array", "ArrayLike", "Bool", "Float", "Int", "Shaped"}  # those of jax, numpy and jaxtyping


def names_of(module: types.ModuleType) -> Iterator[str]:
    """The public names of a module: its `__all__`, or else the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        yield from module.__all__
        return
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name


def public_objects() -> dict[str, Any]:
    """The public objects by their full names, each once: `attnax.flash_attention`, and not `attnax.kernels` too."""
    found: dict[str, Any] = {}
    places: dict[tuple[str, int], str] = {}
    for module in map(importlib.import_module, MODULES):
        for name in names_of(module):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType) or (module.__name__ == "attnax.typing" and name in ARRAY_TYPES):
                continue
            if places.setdefault((name, id(value)), module.__name__) == module.__name__:
                found[f"{module.__name__}.{name}"] = value
    return found


def undocumented(documented: Iterable[str]) -> list[str]:
    """The public names that the reference lacks."""
    return sorted(public_objects().keys() - set(documented))
