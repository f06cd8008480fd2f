"""Gradients of the arrays that a score mod captures, from the sums of a backward kernel.

An operand of the split depends on a query or a key alone: the kernels sum its gradient for each query or key, and JAX
differentiates what was computed before the kernel. A read by query and key together needs a kernel of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.split import Read, Split, add_slabs, split
from attnax.typing import Array

__all__ = ["Captured", "is_each", "pair_axes"]

_SMALL_TABLE = 1024  # the most elements of a table by several indices; a tile may read any of them


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """The arrays that the score mod of a call captures."""

    score_mod: Lifted
    score_shape: tuple[int, int, int, int]  # (B, N, T, S)
    positions: tuple[Array, Array] | None  # (T,) and (S,): the indices of queries and keys, if not 0, 1, ...

    @property
    def split(self) -> Split:
        """The split of the score mod."""
        return split(self.score_mod)

    def how_to_learn(self, read: Read) -> Literal["pairs", "table"] | None:
        """The kernel for the gradient of a table that is read by pair; None if no kernel serves.

        "pairs" if each pair has an element of its own, "table" if a tile reads few elements.
        """
        index = self.split.index_of(read, self.score_shape)
        if read.by_score or any(x is None for axis, x in enumerate(index) if axis not in read.axes):
            return None
        if self.positions is None and (axes := pair_axes(read, index, self.score_shape)) is not None:
            long_enough = all(read.shape[axis] >= self.score_shape[n] for axis, n in zip(axes, (2, 3), strict=True))
            return "pairs" if long_enough else None
        is_small = math.prod(read.shape[axis] for axis in read.axes) <= _SMALL_TABLE
        return "table" if len(read.axes) == 1 or is_small else None

    def why_not_learn(self) -> str | None:
        """The reason why no kernel gives the gradients of the captured arrays, or None."""
        for read in self.split.reads:
            if jnp.issubdtype(read.dtype, jnp.inexact) and self.how_to_learn(read) is None:
                return (
                    f"the gradient of a captured array of shape {read.shape} that is read by query and key together, "
                    "but neither at [q, kv] nor small"
                )
        return None

    def gradients(
        self,
        sums: Mapping[int, Array],
        tables: Sequence[int],
        table: Callable[[int], Array],
    ) -> tuple[Array, ...]:
        """The gradients of the floating arrays.

        Args:
            sums: for each floating operand, the gradient for each query or key, (B, N, T) or (B, N, S) or longer.
            tables: the numbers of the floating reads.
            table: gives the gradient of a read, `Split.reads[n]`, for each slab, (B', N', *sizes along `Read.axes`).
        """
        values = self.score_mod.values
        floats = [n for n, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def operands(given: list[Array]) -> list[Array]:
            changed = dict(zip(floats, given, strict=True))
            whole = [changed.get(n, x) for n, x in enumerate(values)]
            computed = self.split.compute_operands(whole, self.score_shape, self.positions)
            return [x for x in computed if jnp.issubdtype(x.dtype, jnp.inexact)]

        results, pull = jax.vjp(operands, [values[n] for n in floats])
        cotangents = []
        for n, result in zip(sorted(sums), results, strict=True):
            of_keys = result.shape[3] > 1
            total = sums[n][:, :, : self.score_shape[3] if of_keys else self.score_shape[2]]
            total = total[:, :, None, :] if of_keys else total[:, :, :, None]
            extra = tuple(axis for axis in range(4) if result.shape[axis] == 1 and total.shape[axis] > 1)
            cotangents.append(total.sum(extra, keepdims=True).astype(result.dtype))
        (gradients,) = pull(cotangents)
        for n in tables:
            read = self.split.reads[n]
            at = floats.index(read.table)
            share = add_slabs(read.shape, read.axes, table(n), self.split.index_in_bounds(read, self.score_shape))
            gradients[at] = gradients[at] + share.astype(gradients[at].dtype)
        return tuple(gradients)


def pair_axes(
    read: Read, index: Sequence[np.ndarray | None], score_shape: tuple[int, int, int, int]
) -> tuple[int, int] | None:
    """The axes of queries and of keys of a table that is read at [q, kv]; None if the table is read otherwise."""
    if len(read.axes) == 2:
        for axes in (read.axes, read.axes[::-1]):
            if all(is_each(index[axis], n, score_shape[n]) for axis, n in zip(axes, (2, 3), strict=True)):
                return axes[0], axes[1]
    return None


def is_each(index: np.ndarray | None, axis: int, size: int) -> bool:
    """Whether an index array is 0, 1, ... along the queries (axis 2) or keys (axis 3)."""
    want = np.arange(size).reshape([size if axis == other else 1 for other in range(4)])
    return index is not None and index.shape == want.shape and bool((index == want).all())
