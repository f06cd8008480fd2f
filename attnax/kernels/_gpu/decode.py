"""Few queries against stored tokens by a GPU kernel: what it needs to know, gathered when the call is traced."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnax.kernels._core import softmax
from attnax.kernels._core.lift import Deferred, Lifted, defer
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.platform import why_no_card, why_no_triton
from attnax.kernels._core.stored import Stored
from attnax.kernels._gpu import split, tile_lists, tile_sizes
from attnax.masks import Mask, at_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ScoreMod

__all__ = ["DeferredCall", "KernelCall", "bind_kernel", "decode", "kernel_serves", "prepare_kernel"]


@pytree_dataclass
class KernelCall:
    """What the kernel reads."""

    query: Array  # (B, N, T, H), not scaled
    scale: Array
    stored: Stored
    mask: Lifted  # of true positions, as score_mod
    bounds: tile_lists.BoundsAtPositions | None
    score_mod: Lifted | None
    is_opaque: bool = dataclasses.field(metadata={"static": True})
    tile: tile_sizes.Tile = dataclasses.field(metadata={"static": True})


def bind_kernel(
    caller: str,
    query: Array,
    scale: Array,
    stored: Stored,
    positions: Array,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    axes: frozenset[str],
) -> KernelCall | None:
    """The call of the kernel, None where it does not serve the arrays.

    Args:
        caller: for errors of the score mod.
        query: (B, N, T, H), not scaled.
        scale: of the scores.
        stored: the tokens.
        positions: (B, T) of the queries.
        mask: of true positions.
        score_mod: of true positions.
        axes: mesh axes that the arguments vary over.
    """
    sizes = [stored.keys.shape[-1], stored.values.shape[-1]]
    if stored.pages is not None:
        sizes.append(stored.keys.shape[1])
    dtypes = {query.dtype, stored.keys.dtype, stored.values.dtype}
    if len(dtypes) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    # Anything else would have to be copied into another shape at each step.
    if any(size < 16 or size & (size - 1) for size in sizes) or max(sizes[:2]) > tile_sizes.LARGEST_HEAD:
        return None
    tile = _tile_of(query, stored)
    if tile is None:
        return None
    bounds = tile_lists.lift_bounds_at_positions(mask, (positions, stored.positions))
    mask = at_positions(mask, positions, stored.positions)
    mod = None if score_mod is None else at_positions(score_mod, positions, stored.positions)
    call = KernelCall(
        query,
        scale,
        stored,
        split.lift_mask(mask),
        bounds,
        None if mod is None else split.lift_score_mod(caller, mod),
        mask.is_opaque,
        tile,
    )
    return jax.tree.map(lambda x: vary(x, axes), call)


@pytree_dataclass
class DeferredCall:
    """The arguments of `bind_kernel`, kept until a program is lowered for a GPU."""

    query: Array
    scale: Array
    stored: Stored
    positions: Array
    mask: Deferred | None
    score_mod: Deferred | None
    caller: str = dataclasses.field(metadata={"static": True})

    def bind(self) -> KernelCall | None:
        """The call of the kernel, None where it does not serve the arrays."""
        mask, score_mod = (None if function is None else function() for function in (self.mask, self.score_mod))
        axes = varying_axes(self.query)
        return bind_kernel(self.caller, self.query, self.scale, self.stored, self.positions, mask, score_mod, axes)


def prepare_kernel(
    caller: str,
    query: Array,
    scale: Array,
    stored: Stored,
    positions: Array,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    axes: frozenset[str],
) -> KernelCall | DeferredCall | None:
    """`bind_kernel` with the same arguments, put off where mask and score mod can wait."""
    deferred = [None if function is None else defer(function) for function in (mask, score_mod)]
    if any(have is None and function is not None for have, function in zip(deferred, (mask, score_mod), strict=True)):
        return bind_kernel(caller, query, scale, stored, positions, mask, score_mod, axes)
    call = DeferredCall(query, scale, stored, positions, deferred[0], deferred[1], caller)
    return jax.tree.map(lambda x: vary(x, axes), call)


def kernel_serves(call: KernelCall) -> bool:
    """Whether the kernel can hold the mask and the score mod, and this JAX can compile it."""
    functions = [function for function in (call.mask, call.score_mod) if function is not None]
    card = tile_sizes.running_card()
    return (
        why_no_triton() is None
        and why_no_card() is None
        and tile_sizes.why_too_old(card) is None
        and all(split.why_not_split(function) is None for function in functions)
    )


def decode(call: KernelCall, *, interpret: bool = False) -> tuple[Array, Array]:
    """(out, natural log-sum-exp) in float32, by the kernel."""
    from attnax.kernels._gpu import launch  # Pallas takes as long to import as all of the rest, and is seldom wanted

    stored = call.stored
    setup = launch.Setup(call.tile, call.mask, call.bounds, call.is_opaque, call.score_mod, interpret=interpret)
    out, lse = launch.decode((call.query, stored.keys, stored.values, call.scale), setup, stored.pages)
    return out, softmax.natural(lse)


def _tile_of(query: Array, stored: Stored) -> tile_sizes.Tile | None:
    """The tile, of as many keys as a page; None if not every card that the program may run on holds one."""
    sizes, bits = (stored.keys.shape[-1], stored.values.shape[-1]), query.dtype.itemsize * 8
    tile, card = tile_sizes.choose("decode", max(sizes), bits), tile_sizes.running_card()
    if stored.pages is not None:
        tile = tile._replace(block_kv=stored.keys.shape[1])
    return tile if tile_sizes.fits("decode", tile._replace(num_stages=1), *sizes, bits, card) else None
