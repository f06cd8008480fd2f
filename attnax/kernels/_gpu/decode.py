"""A few queries over stored tokens in a GPU kernel: its choice, its operands and its launch."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from attnax.cache import TokenArrays
from attnax.kernels._core import softmax
from attnax.kernels._core.lift import Deferred, Lifted, lift_marked
from attnax.kernels._core.mesh import vary_all, varying_axes
from attnax.kernels._core.natural import GPU_ELEMENTWISE
from attnax.kernels._core.operands import bind_bounds
from attnax.kernels._core.platform import why_no_card, why_no_triton
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.split import why_not_split
from attnax.kernels._core.tile_grid import BoundsAtPositions
from attnax.kernels._gpu import tile_sizes
from attnax.masks import as_mask, at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ScoreMod

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

    def attend(
        self, mask: Lifted | None, score_mod: Lifted | None, *, interpret: bool = False
    ) -> tuple[Array, Array] | None:
        """(out, natural log-sum-exp) in float32, from the kernel; None if the kernel does not serve the call.

        Mask and score mod see true positions. `interpret` runs the kernel as ordinary JAX.
        """
        tile = self._tile()
        if tile is None or any(function is not None and function.refusal for function in (mask, score_mod)):
            return None
        if not interpret and (why_no_triton() or why_no_card() or tile_sizes.why_too_old(tile_sizes.running_card())):
            return None
        tokens, positions = self.tokens, (self.positions, self.tokens.positions)
        of_mask = bind_bounds(self.bounds)
        modify = None if score_mod is None else at_positions(_of_scores(score_mod), *positions)
        keep, bounds, modify = vary_all(
            (
                lift_marked(at_positions(None if mask is None else as_mask(mask), *positions)),
                None if mask is not None and of_mask is None else BoundsAtPositions(of_mask, *positions),
                None if modify is None else lift_marked(modify, scores=jnp.float32),
            ),
            varying_axes(self.query),
        )
        if any(function is not None and why_not_split(function, GPU_ELEMENTWISE) for function in (keep, modify)):
            return None
        from attnax.kernels._gpu import launch  # imports Pallas, which takes long and is seldom needed

        setup = Setup(tile, keep, bounds, self.is_opaque, modify, interpret=interpret)
        arrays = self.query, tokens.keys, tokens.values, self.scale
        out, lse = launch.decode(arrays, setup, tokens.block_table)
        return out, softmax.in_nats(lse)

    def _tile(self) -> tile_sizes.Tile | None:
        """The tile, with as many keys as a page; None if the kernel cannot read the arrays without a copy."""
        tokens, card = self.tokens, tile_sizes.running_card()
        sizes = tokens.keys.shape[-1], tokens.values.shape[-1]
        lengths = sizes if tokens.block_table is None else (*sizes, tokens.keys.shape[2])
        dtypes = {self.query.dtype, tokens.keys.dtype, tokens.values.dtype}
        if len(dtypes) > 1 or self.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return None
        # Any other size would have to be copied into another shape at each step.
        if any(length < 16 or length & (length - 1) for length in lengths) or max(sizes) > tile_sizes.LARGEST_HEAD:
            return None
        bits = self.query.dtype.itemsize * 8
        tile = tile_sizes.choose("decode", max(sizes), bits)
        if tokens.block_table is not None:
            tile = tile._replace(block_kv=tokens.keys.shape[2])
        # Where the card is not known, every card must hold the tile.
        fits = tile_sizes.Footprint("decode", tile._replace(num_stages=1), *sizes, bits).fits(card)
        return tile if fits else None


def _of_scores(score_mod: Lifted) -> ScoreMod:
    """The score mod with results of the shape of the scores."""
    return lambda scores, *indices: jnp.broadcast_to(score_mod(scores, *indices), scores.shape)
