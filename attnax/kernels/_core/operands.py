"""The arguments of every engine: the arrays of a call, and its mask and score mod as programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from attnax.checks import apply_score_mod
from attnax.kernels._core.lift import Deferred, Lifted, defer, lift
from attnax.kernels._core.mesh import vary_with, varying_axes
from attnax.kernels._core.natural import examples
from attnax.kernels._core.pairs import lift_pairs, lift_where_it_can
from attnax.kernels._core.reads_sizes import could_read_sizes
from attnax.masks import Mask
from attnax.pytrees import is_own, pytree_dataclass
from attnax.typing import Array, ScoreMod

__all__ = ["Arrays", "Operands", "bind", "bind_bounds", "lift_bounds", "lift_functions"]

Arrays = tuple[Array, Array, Array, Array]
"""query (B, N, T, H), key (B, K, S, H), value (B, K, S, V) in one floating dtype, and the scale in float32 at least."""


@pytree_dataclass
class Operands:
    """The inputs of both passes besides query, key, value and scale."""

    mask: Lifted | None  # (b, h, q, kv) -> keep
    bounds: Lifted | Deferred | None  # see `lift_bounds`; Deferred until a program needs them
    score_mod: Lifted | None  # (scores, b, h, q, kv) -> scores
    q_index: Array  # (T,) int32: the index of each query that masks and score mods see
    kv_index: Array  # (S,)
    dropout: Array | None  # see `dropout.dropout_words`
    is_opaque: bool = dataclasses.field(metadata={"static": True})  # whether pairs must decide where bounds cannot

    @property
    def learned(self) -> tuple[Array, ...]:
        """The floating arrays of the score mod, with gradients from the backward pass."""
        return () if self.score_mod is None else self.score_mod.floats

    def gradients(self) -> tuple[Array, ...]:
        """Zeros for the sums of the gradients of `learned`, float32 or wider."""
        return () if self.score_mod is None else self.score_mod.gradients()

    def finish(self, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        """The gradients of `learned`, from the sums of the backward pass."""
        return () if self.score_mod is None else self.score_mod.finish(gradients)


def bind(
    caller: str,
    arrays: tuple[Any, Any, Any, Array],
    mask: Mask | None,
    score_mod: ScoreMod | None,
    index: tuple[Array, Array],
    words: Array | None,
    *,
    score_shape: tuple[int, int, int, int],
    tile_shape: tuple[int, int, int, int],
) -> tuple[tuple[Any, Any, Any, Array], Operands]:
    """The arrays and the operands, all marked as varying over the union of their mesh axes.

    Args:
        caller: the name in errors.
        arrays: query, key, value and scale; for arrays that a `shard_map` will cut, the shapes of their shards.
        mask: of the call.
        score_mod: of the call.
        index: of queries and keys.
        words: of the dropout.
        score_shape: (B, N, T, S), of all devices together.
        tile_shape: (B, N, T, S) of a tile; a function that is tied to its shapes is traced at this shape.

    Raises:
        MixedPairsError: the mask or the score mod mixes pairs.
    """
    axes, dtype = frozenset().union(*map(varying_axes, arrays)), arrays[3].dtype
    functions = lift_functions(caller, mask, score_mod, score_shape, axes, dtype)
    bounds: Lifted | Deferred | None = None
    if mask is not None:
        # One tile needs no bounds. Only a GPU kernel, with smaller tiles, may need bounds.
        is_one_tile = tile_shape[2:] == (index[0].size, index[1].size)
        bounds = (defer(mask) if is_one_tile else None) or lift_bounds(mask)
    is_opaque = mask is not None and (mask.is_opaque or bounds is None)

    def operands(axes: frozenset[str]) -> Operands:
        lifted_mask, lifted_mod = functions(*examples(dtype, tile_shape, axes))
        return Operands(lifted_mask, bounds, lifted_mod, *index, words, is_opaque)

    bound, made = vary_with(operands, arrays)
    return bound, made


def lift_functions(
    caller: str,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    score_shape: tuple[int, ...],
    axes: frozenset[str],
    dtype: Any,
) -> Callable[..., tuple[Lifted | None, Lifted | None]]:
    """A function of example arguments (scores, b, h, q, kv) that gives the lifted mask and score mod.

    A mask or score mod whose program runs at any shapes is traced once. Any other is traced at each set of examples.

    Raises:
        MixedPairsError: the mask or the score mod mixes pairs.
    """
    any_mask = None if mask is None else lift_pairs(caller, mask, score_shape, axes)
    any_mod = None if score_mod is None else lift_pairs(caller, score_mod, score_shape, axes, scores=dtype)

    modify = None if score_mod is None else partial(apply_score_mod, caller, score_mod)

    def at(lifted: Lifted | str | None, function: Any, *arguments: Any) -> Lifted | None:
        if isinstance(lifted, str):
            return dataclasses.replace(lift(function, *arguments), refusal=lifted)
        return lifted

    def functions(scores: Any, *indices: Any) -> tuple[Lifted | None, Lifted | None]:
        return at(any_mask, mask, *indices), at(any_mod, modify, scores, *indices)

    return functions


def lift_bounds(mask: Mask) -> Lifted | None:
    """The bounds of tiles: (b, h, first and last q, first and last kv) -> (may any pair attend, do all pairs attend).

    None if the mask has no bounds, or reads the sizes of its arguments; the pairs then decide.
    """
    if type(mask).tile is Mask.tile:
        return None

    def bounds(b: Array, h: Array, *ends: Array) -> tuple[Array, Array]:
        some, every = mask.tile(b, h, (ends[0], ends[1]), (ends[2], ends[3]))
        return jnp.asarray(some), jnp.asarray(every)

    b, h, q, kv = examples()
    lifted = lift_where_it_can(bounds, b, h, q, q, kv, kv)[1]
    return lifted if isinstance(lifted, Lifted) and (is_own(mask) or not could_read_sizes(mask)) else None


def bind_bounds(bounds: Lifted | Deferred | None) -> Lifted | None:
    """The bounds of a mask, where a program needs them."""
    return lift_bounds(bounds()) if isinstance(bounds, Deferred) else bounds
