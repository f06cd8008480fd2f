"""Masks and score mods at true positions.

Kernels know array indices only. Index and position differ in a later chunk of a text, behind left padding, and in a
shard of a ring; `at_positions` is the one translation between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

from attnax.checks import check_broadcast, check_positions
from attnax.masks.arguments import MaskedScoreMod, check_score_mod, split_score_mod
from attnax.masks.mask import Dense, Mask, NoTruth, Range, present_bounds, range_bounds, value_at
from attnax.masks.text import OverText
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Index, Int, ScoreMod, ScoreShape

__all__ = ["AtPositions", "RowsOfCall", "ScoreModAtPositions", "at_positions", "mask_of_cache", "tile_at_positions"]


@pytree_dataclass
class AtPositions(Mask):
    """`mask` read at true positions; a key at a negative position is no token, and no query attends it."""

    mask: Mask | None
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    @property
    def is_opaque(self) -> bool:
        return self.mask is not None and self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        q, kv = value_at(self.q_positions, b, q), value_at(self.kv_positions, b, kv)
        present = jnp.greater_equal(kv, 0)
        return present if self.mask is None else jnp.logical_and(present, self.mask(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        tile = None if self.mask is None else self.mask.tile
        return tile_at_positions(tile, self.q_positions, self.kv_positions, b, h, q_range, kv_range)

    def keys_per_query(self, seq_kv: int) -> int | None:
        return seq_kv if self.mask is None else self.mask.keys_per_query(seq_kv)

    @property
    def num_positions(self) -> int | None:
        return min(self.q_positions.shape[1], self.kv_positions.shape[1])

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        _check_both_positions(caller, self.q_positions, self.kv_positions, score_shape)
        if self.mask is not None:
            self.mask.check(caller, (*score_shape[:2], None, None))


@pytree_dataclass
class ScoreModAtPositions(NoTruth):
    """A score mod read at true positions."""

    score_mod: ScoreMod  # a pytree
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.score_mod(scores, b, h, value_at(self.q_positions, b, q), value_at(self.kv_positions, b, kv))

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises ValueError if the positions, or the mod's arrays, do not fit (B, N, T, S) = `score_shape`.

        The mod gets None for the lengths, because positions have no limit.
        """
        _check_both_positions(caller, self.q_positions, self.kv_positions, score_shape)
        check_score_mod(caller, self.score_mod, (*score_shape[:2], None, None))


@overload
def at_positions(mask_or_mod: Mask | None, q_positions: ArrayLike, kv_positions: ArrayLike) -> Mask: ...
@overload
def at_positions(mask_or_mod: ScoreMod, q_positions: ArrayLike, kv_positions: ArrayLike) -> ScoreMod: ...
def at_positions(
    mask_or_mod: Mask | ScoreMod | None,
    q_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"],
) -> Mask | ScoreMod:
    """Reads a mask or a score mod at true positions instead of array indices.

    Args:
        mask_or_mod: a Mask, or None for "everything attends"; any other function counts as a score mod (wrap a
            plain mask function in `as_mask` first).
        q_positions: the position of each query: an index within its row's own text.
        kv_positions: the position of each key; a negative position marks an empty slot or padding, which no query
            attends.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import at_positions, causal
        >>> mask = at_positions(causal(), jnp.array([7]), jnp.array([6, 7, 8, -1]))
        >>> [bool(mask(0, 0, 0, kv)) for kv in range(4)]
        [True, True, False, False]
    """
    for name, positions in (("q_positions", q_positions), ("kv_positions", kv_positions)):
        if not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
            raise ValueError(f"at_positions: {name} must be integers; got dtype={jnp.result_type(positions)}.")
    # int32: the difference of two unsigned positions is never negative.
    q_positions, kv_positions = (jnp.atleast_2d(jnp.asarray(x, jnp.int32)) for x in (q_positions, kv_positions))
    if mask_or_mod is None or isinstance(mask_or_mod, Mask):
        return AtPositions(mask_or_mod, q_positions, kv_positions)
    score_mod, mask = split_score_mod(mask_or_mod)
    if score_mod is not None:
        score_mod = ScoreModAtPositions(function_pytree(score_mod), q_positions, kv_positions)
    if mask is None:
        assert score_mod is not None
        return score_mod
    return MaskedScoreMod(score_mod, AtPositions(mask, q_positions, kv_positions))


def tile_at_positions(
    tile: Callable[..., tuple[Any, Any]] | None,
    q_positions: Array,
    kv_positions: Array,
    b: Index,
    h: Index,
    q_range: Range,
    kv_range: Range,
) -> tuple[Any, Any]:
    """`AtPositions.tile` for positions (B|1, T) and (B|1, S); `tile` is that of the inner mask, None if all attend."""
    kv_least, kv_most, lowest = present_bounds(kv_positions, b, kv_range)
    some, every = True, True
    if tile is not None:
        some, every = tile(b, h, range_bounds(q_positions, b, q_range), (kv_least, kv_most))
    return jnp.logical_and(some, kv_most >= 0), jnp.logical_and(every, lowest >= 0)


@pytree_dataclass
class RowsOfCall(Mask):
    """A mask array with a row for each query of a call and a column for each position."""

    array: Array  # (B|1, N|1, T, S)
    q_positions: Array  # (B|1, T)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        positions, q = self.q_positions[0 if self.q_positions.shape[0] == 1 else b], jnp.asarray(q)[..., None]
        rank = max(positions.ndim, q.ndim)
        here, sought = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (positions, q))
        return Dense(self.array)(b, h, jnp.argmax(here == sought, axis=-1), kv)

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        batch, heads, _, columns = self.array.shape
        check_broadcast(caller, "mask", (batch, heads, 1, columns), score_shape)


def mask_of_cache(mask: Mask, q_positions: Array, num_positions: int | None) -> Mask:
    """The mask of a call with a cache, with its arrays read at positions; `q_positions` are (B|1, T).

    The columns of an array are positions; positions past the last column get False. The rows are positions if there
    are `num_positions` of them, the capacity of the cache (None for no bound). Otherwise they are the queries in order.
    The mask of a whole text (`OverText`) stays as it is.
    """
    short: list[int] = []

    def convert(node: Any) -> Any:
        if not isinstance(node, Dense):
            return node
        array = node.array
        rows, columns = array.shape[2:]
        if num_positions is not None and 1 < columns < num_positions:
            array = jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, num_positions - columns)))
            short.append(columns)
        if rows in (1, num_positions) or rows != q_positions.shape[1]:
            return Dense(array)
        return RowsOfCall(array, q_positions)

    converted: Mask = jax.tree.map(convert, mask, is_leaf=lambda node: isinstance(node, Dense | AtPositions | OverText))
    if num_positions is None or not short:
        return converted
    # Positions past the end of an array are never attended, not even where `~` inverts the array.
    return converted & Dense((jnp.arange(num_positions) < min(short))[None, None, None])


def _check_both_positions(caller: str, q_positions: Array, kv_positions: Array, score_shape: ScoreShape) -> None:
    batch, _, seq_q, seq_kv = score_shape
    for name, positions, length in (("q_positions", q_positions, seq_q), ("kv_positions", kv_positions, seq_kv)):
        check_positions(caller, name, positions, batch, positions.shape[1] if length is None else length)
