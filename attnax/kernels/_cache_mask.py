"""Arrays as masks of a call with a cache, whose other masks are read at positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.masks import AtPositions, Dense, Mask
from attnax.typing import Array, Full, Index, check_mask_shape, pytree_dataclass

__all__ = ["mask_of_cache"]


@pytree_dataclass
class RowsOfCall(Mask):
    """An array with a row for each query of a call and a column for each position, read at positions."""

    array: Array  # (B|1, N|1, T, S)
    q_positions: Array  # (B|1, T)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        positions, q = self.q_positions[0 if self.q_positions.shape[0] == 1 else b], jnp.asarray(q)[..., None]
        rank = max(positions.ndim, q.ndim)
        here, sought = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (positions, q))
        return Dense(self.array)(b, h, jnp.argmax(here == sought, axis=-1), kv)

    def check(self, caller: str, full: Full) -> None:
        batch, heads, _, columns = self.array.shape
        check_mask_shape(caller, (batch, heads, 1, columns), full)


def mask_of_cache(mask: Mask, q_positions: Array, num_positions: int | None) -> Mask:
    """`mask`, to be read at positions, with its arrays as a call with a cache takes them.

    An array with fewer columns than the cache has positions is about the first ones, and nothing attends those beyond.
    One with a row for each query of the call has them in the order of the queries, unless it has one for each position.

    Args:
        mask: given to the call.
        q_positions: (B|1, T).
        num_positions: of the cache, None if there is no bound.
    """

    def convert(node: Any) -> Any:
        if not isinstance(node, Dense):
            return node
        array = node.array
        rows, columns = array.shape[2:]
        if num_positions is not None and 1 < columns < num_positions:
            array = jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, num_positions - columns)))
        if rows in (1, num_positions) or rows != q_positions.shape[1]:
            return Dense(array)
        return RowsOfCall(array, q_positions)

    return jax.tree.map(convert, mask, is_leaf=lambda node: isinstance(node, Dense | AtPositions))
