"""The arguments of a pass of Pallas kernels, besides query, key, value and scale."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnax.kernels._core.captured import Captured
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.operands import Arrays, Operands, bind_bounds
from attnax.kernels._core.tile_grid import BoundsAtPositions
from attnax.typing import Array

__all__ = ["Setup"]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The arguments of a pass besides query, key, value and scale."""

    tile: Any  # as the engine describes it
    mask: Lifted | None
    bounds: Lifted | BoundsAtPositions | None  # of the mask; None without bounds
    is_opaque: bool
    score_mod: Lifted | None
    positions: tuple[Array, Array] | None = None  # (T,) and (S,): the indices of queries and keys, if not 0, 1, ...
    words: Array | None = None  # of the dropout
    dropout_rate: float = 0.0
    learn_scale: bool = False  # the gradient of the query is not scaled, and in float32
    is_wide: bool = False  # results are in float32
    interpret: Any = False  # run kernels as ordinary JAX, on any platform

    @classmethod
    def of(
        cls, tile: Any, operands: Operands, dropout_rate: float, *, learn_scale: bool, is_part: bool, interpret: Any
    ) -> Setup:
        """The setup of one pass of a call.

        Args:
            tile: of the pass.
            operands: of the call.
            dropout_rate: of the call.
            learn_scale: whether the scale gets a gradient.
            is_part: whether the keys are only some of all keys: `operands` has their indices, and results are float32.
            interpret: whether the kernels run as ordinary JAX.
        """
        of_tiles: Any = bind_bounds(operands.bounds)
        positions = (operands.q_index, operands.kv_index) if is_part else None
        if positions is not None and of_tiles is not None:
            of_tiles = BoundsAtPositions(of_tiles, positions[0][None], positions[1][None])
        return cls(
            tile,
            operands.mask,
            of_tiles,
            operands.is_opaque,
            operands.score_mod,
            positions,
            operands.dropout,
            dropout_rate,
            learn_scale=learn_scale or is_part,
            is_wide=is_part,
            interpret=interpret,
        )

    def captured(self, arrays: Arrays) -> Captured | None:
        """The arrays that the score mod captures, for a call of these arrays."""
        (batch, heads, seq_q, _), seq_kv = arrays[0].shape, arrays[1].shape[2]
        if self.score_mod is None:
            return None
        return Captured(self.score_mod, (batch, heads, seq_q, seq_kv), self.positions)
