"""Layouts of the axes of an array, in the notation of einops: "(N 3 H) I -> I (3 N H)".

An axis is a letter, or a number that is its size. Axes in brackets are merged. The axis 1 may be on one side only. A
layout read from right to left is its inverse, so that one line describes both reading and writing a checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Places", "arrange", "arranged_shape", "find_places", "reverse"]

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


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of a tensor's elements in arrays, each of which takes a range of one of the tensor's axes.

    Attributes:
        views: of the arrays, with the axes of the tensor, in its order and with merged axes apart. Their sizes along
            `axis` add up to the tensor's; along other axes their sizes are the tensor's.
        axis: of the tensor.
    """

    views: tuple[np.ndarray, ...]
    axis: int = 0

    @property
    def shape(self) -> Shape:
        """Of the tensor, with merged axes apart."""
        shape = self.views[0].shape
        whole = sum(view.shape[self.axis] for view in self.views)
        return (*shape[: self.axis], whole, *shape[self.axis + 1 :])

    def at(self, index: int) -> Places:
        """The places of the elements with this index along the first axis."""
        if self.axis:
            return Places(tuple(view[index] for view in self.views), self.axis - 1)
        for view in self.views:
            if index < len(view):
                return Places((view[index],))
            index -= len(view)
        raise IndexError(index)

    def put(self, first: int, block: np.ndarray) -> None:
        """Puts a block of the tensor, the elements from index `first` of the first axis on, to its places."""
        ends = itertools.accumulate(view.shape[self.axis] for view in self.views)
        for view, end in zip(self.views, ends, strict=True):
            begin = end - view.shape[self.axis]
            if self.axis:
                cut = (slice(None),) * self.axis + (slice(begin, end),)
                view[first : first + len(block)] = block[cut]
            elif first < end and begin < first + len(block):
                low, high = max(first, begin), min(first + len(block), end)
                view[low - begin : high - begin] = block[low - first : high - first]


def find_places(arrays: Sequence[np.ndarray], layout: str | None, sizes: Mapping[str, int]) -> Places:
    """The places of the elements of a tensor that holds `arrays` side by side along their last axis.

    Args:
        arrays: contiguous, of shapes that differ along the last axis only.
        layout: from the tensor to the arrays side by side, or None where both are laid out alike.
        sizes: of axes, by their letters.

    Raises:
        ValueError: the arrays do not fit the right side, or end inside of an axis of the tensor.
    """
    if layout is None:
        side = " ".join(f"axis{index}" for index in range(arrays[0].ndim))
        layout = f"{side} -> {side}"
    source, target = map(_groups, layout.split(" -> "))
    widths = [array.shape[-1] for array in arrays]
    bound = _bind(target, (*arrays[0].shape[:-1], sum(widths)), sizes)
    axes, order = ([axis for group in side for axis in group if axis != "1"] for side in (source, target))
    cut, *inner = target[-1]
    step = math.prod(bound[axis] for axis in inner)
    if any(width % step for width in widths):
        raise ValueError(f"layout: {layout!r} has no place for arrays of widths {widths} with {bound}.")
    views = []
    for array, width in zip(arrays, widths, strict=True):
        apart = array.reshape([width // step if axis == cut else bound[axis] for axis in order])
        views.append(apart.transpose([order.index(axis) for axis in axes]))
    return Places(tuple(views), axes.index(cut))


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
