"""The arguments `mask=` and `score_mod=` of an attention function, and the marks that such a function may carry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

from attnax.checks import check_scores
from attnax.masks.arrays import index_grid
from attnax.masks.mask import Mask, NoTruth, as_mask, least_positions
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Index, ScoreMod, ScoreShape

__all__ = [
    "ComposedScoreMod",
    "MaskedScoreMod",
    "check_score_mod",
    "kernel_of",
    "mask_argument",
    "names_residuals",
    "reads_cache_in_chunks",
    "resolve_masks",
    "split_score_mod",
    "takes_mask_objects",
]

Function = TypeVar("Function", bound=Callable[..., Any])


@pytree_dataclass
class MaskedScoreMod(NoTruth):
    """A score mod that carries a mask: `score_mod` first, then -inf where `mask` forbids the pair.

    Kernels split such a mod, so that a mask given as a score mod saves as much work as a mask given as `mask=`.
    """

    score_mod: ScoreMod | None  # a pytree
    mask: Mask

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        if self.score_mod is not None:
            scores = self.score_mod(scores, b, h, q, kv)
        return jnp.where(self.mask(b, h, q, kv), scores, -jnp.inf)

    @property
    def num_positions(self) -> int | None:
        """The number of positions that the arrays of both parts cover; None if there is no limit."""
        return least_positions(self.score_mod, self.mask)


@pytree_dataclass
class ComposedScoreMod(NoTruth):
    """Applies its mods, each a pytree, in order; a pair that one mod masks stays masked."""

    mods: tuple[ScoreMod, ...]

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        first, *rest = self.mods
        scores = self._apply(first, scores, b, h, q, kv)
        for mod in rest:
            masked = scores <= float(jnp.finfo(jnp.float32).min)
            scores = jnp.where(masked, -jnp.inf, self._apply(mod, jnp.where(masked, 0, scores), b, h, q, kv))
        return scores

    def _apply(self, mod: ScoreMod, scores: Array, *indices: Index) -> Array:
        """The scores of one mod; the next mod would broadcast a result of another shape, and hide the error."""
        return check_scores("compose_score_mods", mod(scores, *indices), scores)

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises ValueError if a mod holds arrays that do not fit (B, N, T, S) = `score_shape`."""
        for mod in self.mods:
            check_score_mod(caller, mod, score_shape)

    @property
    def num_positions(self) -> int | None:
        """The number of positions that the arrays of its mods cover; None if there is no limit."""
        return least_positions(*self.mods)


def split_score_mod(score_mod: ScoreMod | None) -> tuple[ScoreMod | None, Mask | None]:
    """The part of a score mod that changes scores, and the mask that it carries."""
    if isinstance(score_mod, MaskedScoreMod):
        return score_mod.score_mod, score_mod.mask
    return score_mod, None


def resolve_masks(
    caller: str, mask: Any, score_mod: ScoreMod | None, score_shape: ScoreShape
) -> tuple[Mask | None, ScoreMod | None]:
    """`mask=` and `score_mod=` of a kernel as one Mask and one score mod without a mask, checked for `score_shape`."""
    score_mod, carried = split_score_mod(score_mod)
    mask = None if mask is None else as_mask(mask)
    if carried is not None:
        mask = carried if mask is None else mask & carried
    if mask is not None:
        mask.check(caller, score_shape)
    check_score_mod(caller, score_mod, score_shape)
    return mask, score_mod


def check_score_mod(caller: str, score_mod: Any, score_shape: ScoreShape) -> None:
    """Raises ValueError if the mod has a `check` and holds arrays that do not fit (B, N, T, S) = `score_shape`."""
    check = getattr(score_mod, "check", None)
    if check is not None:
        check(caller, score_shape)


def mask_argument(
    caller: str, attention_fn: Callable[..., Any], mask: Mask | None, score_shape: tuple[int, int, int, int]
) -> Mask | Array | None:
    """`mask` as `attention_fn` takes it: the mask itself, or an array that broadcasts to `score_shape`."""
    if mask is None:
        return None
    if getattr(kernel_of(attention_fn), "takes_mask_objects", False):
        return mask  # the kernel checks the mask: in a ring only the kernel knows the global lengths
    mask.check(caller, score_shape)
    array = mask(*index_grid(*score_shape))
    return array.reshape((1,) * (4 - array.ndim) + array.shape)  # not `score_shape`: a window is the same for all heads


def kernel_of(attention_fn: Any) -> Any:
    """The function inside of partials, which carries the marks below."""
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    return attention_fn


def takes_mask_objects(attention_fn: Function) -> Function:
    """Marks an attention function whose `mask=` may be a Mask; any other function gets a dense boolean array."""
    attention_fn.takes_mask_objects = True  # type: ignore[attr-defined]
    return attention_fn


def reads_cache_in_chunks(attention_fn: Function) -> Function:
    """Marks an attention function that `cached_attention` may replace for a few queries against a cache."""
    attention_fn.reads_cache_in_chunks = True  # type: ignore[attr-defined]
    return attention_fn


def names_residuals(attention_fn: Function) -> Function:
    """Marks an attention function that names its residuals "attention_out" for `jax.checkpoint`."""
    attention_fn.names_residuals = True  # type: ignore[attr-defined]
    return attention_fn
