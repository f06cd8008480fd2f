"""A few queries over stored tokens in a GPU kernel: its choice, its operands and its launch."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from attnax.checks import apply_score_mod
from attnax.kernels._core import softmax
from attnax.kernels._core.lift import Deferred, Lifted, defer, lift_marked
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.platform import why_no_card, why_no_triton
from attnax.kernels._core.stored import TokenArrays
from attnax.kernels._gpu import split, tile_lists, tile_sizes
from attnax.masks import Mask, as_mask, at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ScoreMod

__all__ = ["BoundKernel", "DecodeInputs", "DeferredKernel", "attend_bound", "kernel_serves", "prepare_kernel"]


@pytree_dataclass
class BoundKernel:
    """The operands of the kernel, with mask and score mod traced."""

    query: Array  # (B, N, T, H), not scaled
    scale: Array
    tokens: TokenArrays
    mask: Lifted  # of true positions, as score_mod
    bounds: tile_lists.BoundsAtPositions | None
    score_mod: Lifted | None
    is_opaque: bool = dataclasses.field(metadata={"static": True})
    tile: tile_sizes.Tile = dataclasses.field(metadata={"static": True})


@pytree_dataclass
class DecodeInputs:
    """A call without its mask and its score mod; all arrays vary over the same mesh axes."""

    query: Array  # (B, N, T, H), not scaled
    scale: Array
    positions: Array  # (B, T) of the queries
    tokens: TokenArrays
    caller: str = dataclasses.field(metadata={"static": True})  # for errors of the score mod

    def bind(
        self, mask: Mask | None, score_mod: ScoreMod | None, lifted_mask: Lifted | None = None
    ) -> BoundKernel | None:
        """The kernel with mask and score mod, both of true positions; None where it does not serve the arrays.

        The pairs of `mask` come from `lifted_mask`, if that is known: a user's function is not called again.
        """
        tile = self._tile()
        if tile is None:
            return None
        axes, positions = varying_axes(self.query), (self.positions, self.tokens.positions)
        bounds = tile_lists.lift_bounds_at_positions(mask, positions)
        is_opaque = mask is not None and mask.is_opaque
        mask = at_positions(mask if lifted_mask is None else as_mask(lifted_mask), *positions)
        mod = None if score_mod is None else at_positions(score_mod, *positions)
        bound = BoundKernel(
            self.query,
            self.scale,
            self.tokens,
            lift_marked(mask),
            bounds,
            None if mod is None else lift_marked(partial(apply_score_mod, self.caller, mod), scores=jnp.float32),
            is_opaque,
            tile,
        )
        return jax.tree.map(lambda x: vary(x, axes), bound)

    def _tile(self) -> tile_sizes.Tile | None:
        """The tile, of as many keys as a page; None where the kernel cannot read the arrays as they are."""
        tokens, card = self.tokens, tile_sizes.running_card()
        sizes = tokens.keys.shape[-1], tokens.values.shape[-1]
        lengths = sizes if tokens.block_table is None else (*sizes, tokens.keys.shape[1])
        dtypes = {self.query.dtype, tokens.keys.dtype, tokens.values.dtype}
        if len(dtypes) > 1 or self.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return None
        # Any other size would have to be copied into another shape at each step.
        if any(length < 16 or length & (length - 1) for length in lengths) or max(sizes) > tile_sizes.LARGEST_HEAD:
            return None
        bits = self.query.dtype.itemsize * 8
        tile = tile_sizes.choose("decode", max(sizes), bits)
        if tokens.block_table is not None:
            tile = tile._replace(block_kv=tokens.keys.shape[1])
        # Where the card is not known, every card must hold the tile.
        fits = tile_sizes.Footprint("decode", tile._replace(num_stages=1), *sizes, bits).fits(card)
        return tile if fits else None


@pytree_dataclass
class DeferredKernel:
    """A kernel whose mask and score mod are traced when a program is lowered for a GPU."""

    inputs: DecodeInputs
    mask: Deferred | None
    score_mod: Deferred | None

    def bind(self) -> BoundKernel | None:
        """The kernel, None where it does not serve the arrays."""
        mask, score_mod = (None if function is None else function() for function in (self.mask, self.score_mod))
        return self.inputs.bind(mask, score_mod)


def prepare_kernel(
    inputs: DecodeInputs,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    lifted_mask: Lifted | None,
    lifted_mod: Lifted | None,
) -> BoundKernel | DeferredKernel | None:
    """The kernel, bound when a program is lowered for a GPU if both functions can be deferred; None if it cannot serve.

    Args:
        inputs: of the call.
        mask: of true positions.
        score_mod: likewise.
        lifted_mask: the mask as a program.
        lifted_mod: the score mod as a program.
    """
    functions, axes = (mask, score_mod), varying_axes(inputs.query)
    deferred = [None if function is None else defer(function) for function in functions]
    if any(have is None and function is not None for have, function in zip(deferred, functions, strict=True)):
        is_natural = all(lifted is None or lifted.refusal is None for lifted in (lifted_mask, lifted_mod))
        if not is_natural:
            return None

        def modify(scores: Array, *indices: Array) -> Array:
            assert lifted_mod is not None
            return jnp.broadcast_to(lifted_mod(scores, *indices), scores.shape)

        return inputs.bind(mask, None if lifted_mod is None else modify, lifted_mask)
    return jax.tree.map(lambda x: vary(x, axes), DeferredKernel(inputs, *deferred))


def kernel_serves(kernel: BoundKernel) -> bool:
    """Whether the kernel can hold the mask and the score mod, and this JAX can compile it."""
    functions = [function for function in (kernel.mask, kernel.score_mod) if function is not None]
    card = tile_sizes.running_card()
    return (
        why_no_triton() is None
        and why_no_card() is None
        and tile_sizes.why_too_old(card) is None
        and all(split.why_not_split(function) is None for function in functions)
    )


def attend_bound(kernel: BoundKernel, *, interpret: bool = False) -> tuple[Array, Array]:
    """(out, natural log-sum-exp) in float32, by the kernel."""
    from attnax.kernels._gpu import launch  # imports Pallas, which takes long and is seldom needed

    tokens = kernel.tokens
    setup = launch.Setup(
        kernel.tile, kernel.mask, kernel.bounds, kernel.is_opaque, kernel.score_mod, interpret=interpret
    )
    out, lse = launch.decode((kernel.query, tokens.keys, tokens.values, kernel.scale), setup, tokens.block_table)
    return out, softmax.natural(lse)
