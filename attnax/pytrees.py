"""Dataclasses and functions as pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

__all__ = ["function_pytree", "is_own", "pytree_dataclass"]

Instance = TypeVar("Instance")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree_dataclass(cls: type[Instance]) -> type[Instance]:
    """A frozen dataclass whose fields are the children of a pytree."""
    made = dataclasses.dataclass(frozen=True)(cls)
    # JAX rebuilds pytrees with other objects as leaves, so the type checks of the tests must let any value in.
    made.__no_type_check__ = True  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(made)


def function_pytree(function: Any) -> Any:
    """A function as a pytree: a pytree (its arrays are leaves) stays, any other function gets no leaves."""
    return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function


def is_own(function: Any) -> bool:
    """Whether all parts of a mask or score mod are from Attnax."""
    own = True

    def visit(node: Any) -> bool:
        nonlocal own
        known = isinstance(node, jax.Array | np.ndarray | int | float) or type(node) in (tuple, list, dict, type(None))
        own = own and (known or type(node).__module__.startswith("attnax."))
        return False

    jax.tree.flatten(function, is_leaf=visit)
    return own
