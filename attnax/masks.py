"""Masks as values: who may attend whom, written once and read in two ways.

A `Mask` is a callable pytree. Pointwise, `mask(b, h, q, kv)` says whether query `q` may attend key `kv`
(indices are integer arrays of any shapes that broadcast together). Over a tile,
`mask.tile(b, h, q_range, kv_range)` bounds the same answer for whole ranges by interval arithmetic, which is
what lets a kernel skip the tiles that a mask forbids. True means attend. Masks combine with `&`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from attnax.typing import (
    Array,
    ArrayLike,
    Bool,
    Index,
    Int,
    MaskMod,
    ScoreMod,
    check_mask_shape,
    check_positions,
    function_pytree,
    pytree_dataclass,
)

__all__ = ["Mask", "as_mask", "at_positions", "causal", "index_grid", "mask_argument", "padding", "takes_mask_objects"]

Function = TypeVar("Function", bound=Callable[..., Any])

Range = tuple[Index, Index]
"""First and last index of a tile along one axis, both included."""


class Mask:
    """A boolean function of (batch, head, query, key) that also knows its value over tiles."""

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        """True where query `q` may attend key `kv`; the shape is what the indices broadcast to, or smaller."""
        raise NotImplementedError

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        """Bounds over a tile: `(may any pair attend, do all pairs attend)`.

        Both are safe: `any` may be True where nothing attends, `all` may be False where everything does.
        `(True, False)`, the default, means "cannot tell".
        """
        return True, False

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        """Raises ValueError if the mask holds arrays that do not fit (B, N, T, S) = `full`."""

    def __and__(self, other: Mask | MaskMod | ArrayLike) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: MaskMod | ArrayLike) -> Mask:
        return And(as_mask(other), self)

    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to __rand__


@pytree_dataclass
class And(Mask):
    """Both masks allow the pair."""

    left: Mask
    right: Mask

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.logical_and(self.left(b, h, q, kv), self.right(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        left_any, left_all = self.left.tile(b, h, q_range, kv_range)
        right_any, right_all = self.right.tile(b, h, q_range, kv_range)
        return jnp.logical_and(left_any, right_any), jnp.logical_and(left_all, right_all)

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        self.left.check(caller, full)
        self.right.check(caller, full)


@pytree_dataclass
class Causal(Mask):
    """A query attends the keys at its own position and before."""

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less_equal(kv, q)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        return jnp.less_equal(kv_range[0], q_range[1]), jnp.less_equal(kv_range[1], q_range[0])


@pytree_dataclass
class Lengths(Mask):
    """Row `b` holds `lengths[b]` real keys, then padding."""

    lengths: Array

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less(kv, self.lengths[b])

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        lengths = self.lengths[b]
        return jnp.less(kv_range[0], lengths), jnp.less(kv_range[1], lengths)

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        if self.lengths.shape != full[:1]:
            raise ValueError(
                f"{caller}: padding(lengths) needs one length a batch row; "
                f"got lengths.shape={self.lengths.shape} for batch={full[0]}."
            )


@pytree_dataclass
class Dense(Mask):
    """A boolean array that broadcasts to (B, N, T, S), read lazily at the indices asked for."""

    array: Array  # (B|1, N|1, T|1, S|1)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        indices = zip((b, h, q, kv), self.array.shape, strict=True)
        # Positions may lie past the array (a cache has spare room): nothing attends there.
        return self.array.at[tuple(0 if size == 1 else index for index, size in indices)].get(
            mode="fill", fill_value=False
        )

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        check_mask_shape(caller, self.array.shape, full)


@pytree_dataclass
class Pointwise(Mask):
    """A user's function `(b, h, q, kv) -> bool`; nothing is known about its tiles."""

    function: MaskMod  # a pytree

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        allowed = jnp.asarray(self.function(b, h, q, kv))
        if allowed.dtype != jnp.bool_:
            raise ValueError(
                f"mask: a mask function must return booleans, True to attend; got dtype={allowed.dtype}. "
                "Add a bias by a score_mod."
            )
        return allowed


@pytree_dataclass
class AtPositions(Mask):
    """`mask` read at true positions; a key at a negative position is no token, and nothing attends it."""

    mask: Mask | None
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        q, kv = _read(self.q_positions, b, q), _read(self.kv_positions, b, kv)
        present = jnp.greater_equal(kv, 0)
        return present if self.mask is None else jnp.logical_and(present, self.mask(b, h, q, kv))

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        _check_both_positions(caller, self.q_positions, self.kv_positions, full)


@pytree_dataclass
class ScoreModAtPositions:
    """A score mod read at true positions."""

    score_mod: ScoreMod  # a pytree
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.score_mod(scores, b, h, _read(self.q_positions, b, q), _read(self.kv_positions, b, kv))

    def check(self, caller: str, full: tuple[int, int, int, int]) -> None:
        """Raises ValueError if the positions do not fit (B, N, T, S) = `full`."""
        _check_both_positions(caller, self.q_positions, self.kv_positions, full)


def causal() -> Mask:
    """Each query attends itself and what came before: `kv <= q`.

    On bare arrays q and kv are indices, also when T != S; use `at_positions` for a chunk that starts later.

    Example:
        >>> from attnax.masks import causal
        >>> bool(causal()(0, 0, q=2, kv=1)), bool(causal()(0, 0, q=1, kv=2))
        (True, False)
    """
    return Causal()


def padding(real: Int[ArrayLike, B] | Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"]) -> Mask:
    """Nothing attends padding keys.

    Args:
        real: how many keys of each row are real, the padding being on the right; or which keys are, as
            booleans.

    Raises:
        ValueError: an array of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import causal, padding
        >>> mask = causal() & padding(jnp.array([3, 5]))
        >>> bool(mask(0, 0, q=4, kv=3)), bool(mask(1, 0, q=4, kv=3))
        (False, True)
    """
    real = jnp.asarray(real)
    if jnp.issubdtype(real.dtype, jnp.integer) and real.ndim == 1:
        return Lengths(real)
    if real.dtype == jnp.bool_ and real.ndim == 2:
        return Dense(real[:, None, None, :])
    if real.dtype == jnp.bool_ and real.ndim == 4 and real.shape[1:3] == (1, 1):
        return Dense(real)
    raise ValueError(
        "padding: give integer lengths (batch,) or booleans (batch, length), True for a real token; "
        f"got shape={real.shape}, dtype={real.dtype}."
    )


def as_mask(mask: Mask | MaskMod | ArrayLike) -> Mask:
    """The Mask of a boolean array (which broadcasts to (B, N, T, S)) or of a function `(b, h, q, kv) -> bool`.

    Raises:
        ValueError: an array that is not boolean or has more than 4 axes, or anything that cannot be called.
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


@overload
def at_positions(
    mask_or_mod: Mask | None,
    q_positions: Int[ArrayLike, T] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, S] | Int[ArrayLike, "#B S"],
) -> Mask: ...
@overload
def at_positions(
    mask_or_mod: ScoreMod,
    q_positions: Int[ArrayLike, T] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, S] | Int[ArrayLike, "#B S"],
) -> ScoreMod: ...
def at_positions(
    mask_or_mod: Mask | ScoreMod | None,
    q_positions: Int[ArrayLike, T] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, S] | Int[ArrayLike, "#B S"],
) -> Mask | ScoreMod:
    """Reads a mask or a score mod at true positions instead of array indices.

    Kernels only know array indices. Where index and position differ (the second chunk of a text, left
    padding, a shard of a ring) this is the one translation between them.

    Args:
        mask_or_mod: a Mask, or None for "everything attends"; anything else is taken as a score mod (wrap a
            plain mask function in `as_mask` first).
        q_positions: the position of each query: an index within its row's own text.
        kv_positions: the position of each key; a negative one marks an empty slot or padding, which nothing
            attends.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import at_positions, causal
        >>> mask = at_positions(causal(), jnp.array([7]), jnp.array([6, 7, 8, -1]))
        >>> [bool(mask(0, 0, 0, kv)) for kv in range(4)]
        [True, True, False, False]
    """
    q_positions, kv_positions = jnp.atleast_2d(jnp.asarray(q_positions)), jnp.atleast_2d(jnp.asarray(kv_positions))
    if mask_or_mod is None or isinstance(mask_or_mod, Mask):
        return AtPositions(mask_or_mod, q_positions, kv_positions)
    return ScoreModAtPositions(function_pytree(mask_or_mod), q_positions, kv_positions)


def index_grid(batch: int, num_heads: int, seq_q: int, seq_kv: int) -> tuple[Array, Array, Array, Array]:
    """Indices b, h, q, kv of shapes (B,1,1,1), (1,N,1,1), (1,1,T,1), (1,1,1,S): every pair, by broadcasting."""
    return (
        jnp.arange(batch)[:, None, None, None],
        jnp.arange(num_heads)[None, :, None, None],
        jnp.arange(seq_q)[None, None, :, None],
        jnp.arange(seq_kv)[None, None, None, :],
    )


def takes_mask_objects(attention_fn: Function) -> Function:
    """Marks an attention function whose `mask=` may be a Mask; any other gets a dense boolean array."""
    attention_fn.takes_mask_objects = True  # type: ignore[attr-defined]
    return attention_fn


def mask_argument(
    caller: str, attention_fn: Callable[..., Any], mask: Mask | None, full: tuple[int, int, int, int]
) -> Mask | Array | None:
    """`mask` in the form that `attention_fn` takes; `full` is (B, N, T, S)."""
    if mask is None:
        return None
    mask.check(caller, full)
    kernel = attention_fn
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    if getattr(kernel, "takes_mask_objects", False):
        return mask
    return jnp.broadcast_to(mask(*index_grid(*full)), full)


def _read(positions: Array, b: Index, index: Index) -> Array:
    return positions[0 if positions.shape[0] == 1 else b, index]


def _check_both_positions(
    caller: str, q_positions: Array, kv_positions: Array, full: tuple[int, int, int, int]
) -> None:
    check_positions(caller, "q_positions", q_positions, full[0], full[2])
    check_positions(caller, "kv_positions", kv_positions, full[0], full[3])
