"""Layouts of the axes of an array, in the notation of einops: "(N 3 H) I -> I (3 N H)".

An axis is a letter, or a number that is its size. Axes in brackets are merged. The axis 1 may be on one side only. A
layout read from right to left is its inverse, so that one line describes both reading and writing a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["arrange", "arranged_shape", "reverse"]

_GROUP = re.compile(r"\(([^)]*)\)|(\S+)")
Shape = tuple[int, ...]


def reverse(layout: str) -> str:
    """The layout that undoes `layout`."""
    return " -> ".join(reversed(layout.split(" -> ")))


def arrange(array: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
    """The array in the new layout; a view if NumPy can make one.

    Args:
        array: in the layout of the left side.
        layout: both sides hold the same axes.
        sizes: of axes, by their letters; one axis of each group may be left out.

    Raises:
        ValueError: the array does not fit the left side.
    """
    source, target = map(_groups, layout.split(" -> "))
    bound = _bind(source, array.shape, sizes)
    axes, order = ([axis for group in side for axis in group if axis != "1"] for side in (source, target))
    apart = array.reshape([bound[axis] for axis in axes])
    return apart.transpose([axes.index(axis) for axis in order]).reshape(_shape(target, bound))


def arranged_shape(shape: Shape, layout: str, sizes: Mapping[str, int]) -> Shape:
    """The shape that `arrange` gives an array of `shape`."""
    source, target = map(_groups, layout.split(" -> "))
    return _shape(target, _bind(source, shape, sizes))


def _groups(side: str) -> list[list[str]]:
    return [(merged or single).split() for merged, single in _GROUP.findall(side)]


def _shape(groups: Sequence[Sequence[str]], bound: Mapping[str, int]) -> Shape:
    return tuple(math.prod(bound[axis] for axis in group) for group in groups)


def _bind(groups: Sequence[Sequence[str]], shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis."""
    bound = {"1": 1} | {
        axis: int(axis) if axis.isdecimal() else sizes.get(axis, -1) for group in groups for axis in group
    }
    for group, size in zip(groups, shape, strict=True):
        known = math.prod(bound[axis] for axis in group if bound[axis] >= 0)
        for axis in group:
            if bound[axis] < 0:
                bound[axis] = size // max(known, 1)
    if _shape(groups, bound) != shape:
        raise ValueError(f"layout: {groups} does not fit the shape {shape} with {bound}.")
    return bound
