"""Mask arrays in a call with a cache, where masks are read at positions rather than indices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.checks import check_broadcast
from attnax.masks.mask import Dense, Mask
from attnax.masks.positions import AtPositions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Index, ScoreShape

__all__ = ["RowsOfCall", "mask_of_cache"]


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
    """`mask` with every array in it changed so that it is read at positions.

    The columns of an array are positions. An array with fewer columns than the cache has positions is about the first
    ones; later positions get False. The rows of an array are positions if there are as many as the cache has, otherwise
    the queries of the call in order.

    Args:
        mask: given to the call.
        q_positions: (B|1, T), the position of each query.
        num_positions: number of positions that the cache can hold, None if there is no bound.
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

    converted: Mask = jax.tree.map(convert, mask, is_leaf=lambda node: isinstance(node, Dense | AtPositions))
    if num_positions is None or not short:
        return converted
    # Positions past the end of an array are never attended, not even where `~` inverts the array.
    return converted & Dense((jnp.arange(num_positions) < min(short))[None, None, None])
