"""A few queries over stored tokens, as the kernels of any platform take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from attnax.cache import TokenArrays
from attnax.kernels._core.lift import Deferred, Lifted, lift_marked
from attnax.kernels._core.mesh import vary_all, varying_axes
from attnax.kernels._core.operands import Arrays, bind_bounds
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.split import why_not_split
from attnax.kernels._core.tile_grid import BoundsAtPositions
from attnax.masks import as_mask, at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, MaskMod, ScoreMod

__all__ = ["DecodeInputs"]


@pytree_dataclass
class DecodeInputs:
    """The arrays of a call, and the bounds of its mask; all arrays vary over the same mesh axes."""

    query: Array  # (B, N, T, H), not scaled
    scale: Array
    positions: Array  # (B, T) of the queries
    tokens: TokenArrays
    bounds: Lifted | Deferred | None = None  # see `lift_bounds`
    is_opaque: bool = dataclasses.field(default=False, metadata={"static": True})  # see `Operands`

    @property
    def arrays(self) -> Arrays:
        """Query, keys, values and scale; keys and values may be pages."""
        return self.query, self.tokens.keys, self.tokens.values, self.scale

    def setup(
        self,
        tile: Any,
        mask: Lifted | None,
        score_mod: Lifted | None,
        elementwise: frozenset[str],
        *,
        interpret: bool = False,
    ) -> Setup | None:
        """The setup of a kernel that reads mask and score mod at true positions; None if no kernel can hold them.

        Args:
            tile: as the engine describes it.
            mask: of true positions.
            score_mod: of true positions.
            elementwise: the primitives that the engine's kernels may use.
            interpret: whether the kernel runs as ordinary JAX.
        """
        if any(function is not None and function.refusal for function in (mask, score_mod)):
            return None
        positions, of_mask = (self.positions, self.tokens.positions), bind_bounds(self.bounds)
        modify = None if score_mod is None else at_positions(_of_scores(score_mod), *positions)
        keep, bounds, modify = vary_all(
            (
                lift_marked(at_positions(None if mask is None else as_mask(_of_tokens(mask)), *positions)),
                None if mask is not None and of_mask is None else BoundsAtPositions(of_mask, *positions),
                None if modify is None else lift_marked(modify, scores=jnp.float32),
            ),
            varying_axes(self.query),
        )
        if any(function is not None and why_not_split(function, elementwise) for function in (keep, modify)):
            return None
        return Setup(tile, keep, bounds, self.is_opaque, modify, interpret=interpret)


def _of_tokens(mask: Lifted) -> MaskMod:
    """The mask without queries at negative positions: these are padding, and not the last row of a mask's arrays."""
    return lambda b, h, q, kv: mask(b, h, q, kv) & (q >= 0)


def _of_scores(score_mod: Lifted) -> ScoreMod:
    """The score mod with results of the shape of the scores."""
    return lambda scores, *indices: jnp.broadcast_to(score_mod(scores, *indices), scores.shape)
