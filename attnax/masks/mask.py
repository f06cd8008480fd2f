"""The mask, a value that is read in two ways, and its algebra.

Pointwise, `mask(b, h, q, kv)` says whether query `q` may attend key `kv`. Indices are integer arrays of any shapes that
broadcast together. Over a tile, `mask.tile(b, h, q_range, kv_range)` bounds the same answer for whole ranges by
interval arithmetic, so that a kernel can skip the tiles that a mask forbids. True means attend.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.checks import check_broadcast, explain_tracing, is_concrete
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Index, MaskMod, ScoreShape

__all__ = ["And", "Dense", "Mask", "NoTruth", "Not", "Pointwise", "Range", "as_mask", "least_positions", "positions_of"]

Range = tuple[Index, Index]
"""First and last index of a tile along one axis, both included."""

_BLOCK = 16  # tokens that share one pair of bounds


class NoTruth:
    """A function with a value for each pair and no truth value: `and`, `or`, `not` and `if` raise TypeError."""

    def __bool__(self) -> bool:
        raise TypeError(
            f"{type(self).__name__}: a mask or score mod has a value for each pair, and no truth value for `and`, "
            "`or`, `not` and `if`. Combine masks by `&`, `|` and `~` and score mods by compose_score_mods; write "
            "`is None` to test whether there is one."
        )


class Mask(NoTruth):
    """A boolean function of (batch, head, query, key) that also bounds its value over tiles."""

    @property
    def is_opaque(self) -> bool:
        """Whether `tile` may report an empty or a full tile as partial.

        A kernel then evaluates the pairs of each partial tile. False for a mask whose `tile` is exact enough.
        """
        return True

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        """True where query `q` may attend key `kv`; the shape is that of the broadcast indices, or smaller."""
        raise NotImplementedError

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        """Bounds over a tile: `(may any pair attend, do all pairs attend)`.

        Both bounds are safe: the first may be True if no pair attends, the second may be False if all pairs attend.
        `(True, False)`, the default, means "cannot tell".
        """
        return True, False

    def keys_per_query(self, seq_kv: int) -> int | None:
        """About how many of `seq_kv` keys a query attends; a kernel chooses its tiles by it, and no result changes.

        None, the default, means "cannot tell".
        """
        return None

    @property
    def num_positions(self) -> int | None:
        """The number of positions that the mask's arrays cover; None if there is no limit."""
        return None

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises ValueError if the mask holds arrays that do not fit (B, N, T, S) = `score_shape`."""

    def __and__(self, other: Mask | MaskMod | ArrayLike) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: MaskMod | ArrayLike) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Mask | MaskMod | ArrayLike) -> Mask:
        return ~(~self & ~as_mask(other))

    def __ror__(self, other: MaskMod | ArrayLike) -> Mask:
        return ~(~as_mask(other) & ~self)

    def __invert__(self) -> Mask:
        return Not(self)

    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to __rand__


@pytree_dataclass
class And(Mask):
    """Both masks allow the pair."""

    left: Mask
    right: Mask

    @property
    def is_opaque(self) -> bool:
        return self.left.is_opaque or self.right.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.logical_and(self.left(b, h, q, kv), self.right(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        left_any, left_all = self.left.tile(b, h, q_range, kv_range)
        right_any, right_all = self.right.tile(b, h, q_range, kv_range)
        return jnp.logical_and(left_any, right_any), jnp.logical_and(left_all, right_all)

    def keys_per_query(self, seq_kv: int) -> int | None:
        left, right = self.left.keys_per_query(seq_kv), self.right.keys_per_query(seq_kv)
        return None if left is None or right is None else min(left, right)

    @property
    def num_positions(self) -> int | None:
        return least_positions(self.left, self.right)

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        self.left.check(caller, score_shape)
        self.right.check(caller, score_shape)


@pytree_dataclass
class Not(Mask):
    """The pairs that `mask` forbids; `a | b` is `~(~a & ~b)`."""

    mask: Mask

    @property
    def is_opaque(self) -> bool:
        return self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.logical_not(self.mask(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        some, every = self.mask.tile(b, h, q_range, kv_range)
        return jnp.logical_not(every), jnp.logical_not(some)

    def keys_per_query(self, seq_kv: int) -> int | None:
        forbidden = self.mask.keys_per_query(seq_kv)
        return None if forbidden is None else seq_kv - forbidden

    @property
    def num_positions(self) -> int | None:
        return self.mask.num_positions

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        self.mask.check(caller, score_shape)


@pytree_dataclass
class Dense(Mask):
    """A boolean array that broadcasts to (B, N, T, S), read only at the indices that a kernel visits."""

    array: Array  # (B|1, N|1, T|1, S|1)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        indices = zip((b, h, q, kv), self.array.shape, strict=True)
        # Positions may lie past the array (a cache has spare room): no pair attends there.
        return self.array.at[tuple(0 if size == 1 else index for index, size in indices)].get(
            mode="fill", fill_value=False
        )

    def keys_per_query(self, seq_kv: int) -> int | None:
        return seq_kv if self.array.shape[2] == 1 else None

    @property
    def num_positions(self) -> int | None:
        return positions_of(self.array)

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        check_broadcast(caller, "mask", self.array.shape, score_shape)


@pytree_dataclass
class Pointwise(Mask):
    """A user's function `(b, h, q, kv) -> bool`; on CPUs kernels find bounds of its tiles in its trace."""

    function: MaskMod  # a pytree

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        with explain_tracing("mask", "a mask function"):
            allowed = jnp.asarray(self.function(b, h, q, kv))
        if allowed.dtype != jnp.bool_:
            raise ValueError(
                f"mask: a mask function must return booleans, True to attend; got dtype={allowed.dtype}. "
                "Add a bias by a score_mod."
            )
        return allowed


def as_mask(mask: Mask | MaskMod | ArrayLike) -> Mask:
    """The Mask of a boolean array (which broadcasts to (B, N, T, S)) or of a function `(b, h, q, kv) -> bool`.

    Raises:
        ValueError: an array that is not boolean or has more than 4 axes, or an object that cannot be called.
    """
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, jax.Array | np.ndarray):
        if mask.dtype != jnp.bool_ or mask.ndim > 4:
            raise ValueError(
                "as_mask: a mask array must be boolean, True to attend, and broadcast to "
                f"(batch, num_heads, seq_q, seq_kv); got shape={mask.shape}, dtype={mask.dtype}."
            )
        return Dense(jnp.asarray(mask).reshape((1,) * (4 - mask.ndim) + mask.shape))
    if callable(mask):
        return Pointwise(function_pytree(mask))
    raise ValueError(f"as_mask: a mask is a boolean array, a Mask or a function (b, h, q, kv) -> bool; got {mask!r}.")


def least_positions(*parts: Any) -> int | None:
    """The positions that the arrays of all masks and score mods cover; None if there is no limit."""
    known = [getattr(part, "num_positions", None) for part in parts]
    return min((n for n in known if n is not None), default=None)


def positions_of(array: Array) -> int | None:
    """The positions that an array (B|1, N|1, T|1, S|1) covers; None if there is no limit."""
    return min((size for size in array.shape[2:] if size > 1), default=None)


def value_at(values: Array, b: Index, index: Index) -> Array:
    """`values[b, index]` of (B|1, length); an out-of-range index reads the nearest value, as in `range_bounds`."""
    return values[0 if values.shape[0] == 1 else b, jnp.maximum(index, 0)]


def range_bounds(
    values: ArrayLike, b: Index, index_range: Range, tables: list[Any] | None = None
) -> tuple[Array, Array]:
    """Bounds (least, greatest) on `values[b, first:last + 1]`, exact for a range of whole blocks of 16.

    Args:
        values: (B|1, length).
        b: row of the values.
        index_range: first and last index.
        tables: `range_tables(values)`, where they are there already.
    """
    tables = range_tables(values) if tables is None else tables
    first, last = (jnp.clip(jnp.asarray(index), 0, values.shape[1] - 1) // _BLOCK for index in index_range)
    level = jnp.maximum(31 - lax.clz((last - first + 1).astype(jnp.int32)), 0)
    row = 0 if values.shape[0] == 1 else b
    least, most = (
        join(table[level, row, first], table[level, row, last + 1 - (1 << level)])
        for table, join in zip(map(jnp.asarray, tables), (jnp.minimum, jnp.maximum), strict=True)
    )
    return least, most


def present_bounds(values: ArrayLike, b: Index, index_range: Range) -> tuple[Array, Array, Array]:
    """Bounds (least, greatest) as `range_bounds`, on the values that are not negative; then the least of all values.

    Without such a value the first is the greatest integer and the second is negative.
    """
    xp, values = (np, np.asarray(values)) if is_concrete(values) else (jnp, values)  # as in `range_tables`
    absent_last = xp.where(values < 0, jnp.iinfo(values.dtype).max, values)
    least, _ = range_bounds(absent_last, b, index_range)
    lowest, most = range_bounds(values, b, index_range)
    return least, most, lowest


def range_tables(values: ArrayLike) -> list[Any]:
    """The bounds of ranges of `values` (B|1, length), for `range_bounds`.

    Level j of a table holds the bounds of 2**j blocks from each block on; two entries of one level cover any range.
    """
    # NumPy computes the tables of a constant. XLA would fold them while it compiles, longer for a longer text.
    return _range_tables(np.asarray(values), np) if is_concrete(values) else _range_tables(values, jnp)


def _range_tables(values: Any, xp: Any) -> list[Any]:
    """The least and the greatest values, each (levels, B|1, blocks), by NumPy or `jax.numpy`."""
    blocks = -(-values.shape[1] // _BLOCK)
    blocked = xp.pad(values, ((0, 0), (0, blocks * _BLOCK - values.shape[1])), mode="edge")
    blocked = blocked.reshape(-1, blocks, _BLOCK)
    tables = []
    for reduce, join in ((xp.min, xp.minimum), (xp.max, xp.maximum)):
        table = [reduce(blocked, axis=2)]
        while 2 ** len(table) <= blocks:
            half = 2 ** (len(table) - 1)
            table.append(join(table[-1], xp.pad(table[-1][:, half:], ((0, 0), (0, half)), mode="edge")))
        tables.append(xp.stack(table))
    return tables
