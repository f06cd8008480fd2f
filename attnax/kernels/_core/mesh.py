"""The mesh axes of an enclosing `shard_map` over which a value varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

__all__ = ["vary", "vary_all", "vary_with", "varying_axes", "varying_shape"]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes of an enclosing `shard_map` over which the value may differ."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return frozenset()
    aval = jax.typeof(x)
    return frozenset(aval.mat.varying if hasattr(aval, "mat") else aval.vma)


def vary(x: Any, axes: frozenset[str]) -> Any:
    """`x`, marked as varying over `axes` too."""
    new = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, new, to="varying") if new else x


def varying_shape(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a result that varies over the mesh axes over which `like` varies."""
    aval, axes = jax.typeof(like), varying_axes(like)
    varying: dict[str, Any] = {}
    if axes:
        varying = {"manual_axis_type": aval.mat} if hasattr(aval, "mat") else {"vma": axes}
    return jax.ShapeDtypeStruct(shape, dtype, **varying)


def vary_all(tree: Any, axes: frozenset[str]) -> Any:
    """Every array of a tree, marked as varying over `axes` too."""
    return jax.tree.map(lambda x: vary(x, axes), tree) if axes else tree


def vary_with(make: Callable[[frozenset[str]], Any], *trees: Any) -> tuple[Any, ...]:
    """`(*trees, make(axes))`, marked as varying over `axes`: all mesh axes over which any array among them varies.

    A function that `make` traces may capture arrays that vary over more axes than `trees`, so `make` is called until no
    further axis is found.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(trees)))
    while True:
        made = make(axes)
        more = axes.union(*map(varying_axes, jax.tree.leaves(made)))
        if more == axes:
            return tuple(vary_all(tree, axes) for tree in (*trees, made))
        axes = more
