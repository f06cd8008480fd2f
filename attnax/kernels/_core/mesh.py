"""The mesh axes of an enclosing `shard_map` over which a value varies."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

__all__ = ["vary", "varying_axes"]


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
