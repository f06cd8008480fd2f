"""An attention layer with a cache: its tokens join the cache and attend all of it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax.numpy as jnp

from attnax.cache import SPARE_SLOTS, EmptyCache, LinearLayerCache
from attnax.kernels.cached import cached_attention
from attnax.kernels.linear import linear_attention
from attnax.kernels.lite import lite_attention
from attnax.masks import Causal, at_positions, causal, kernel_of, mask_of_cache, padding
from attnax.nn._kernel import Heads, Kernel, LiteAttention
from attnax.typing import Array, AttentionFn

__all__ = ["attend_cache", "check_cache"]


def check_cache(function: AttentionFn, cache: Any, window: int | None) -> None:
    """Raises unless the attention function can read the cache, and the cache holds the layer's window."""
    if isinstance(cache, EmptyCache):
        cache.check("MultiHeadAttention")
        cache = cache.cache
    kernel = kernel_of(function)
    is_lite = isinstance(kernel, LiteAttention) or kernel is lite_attention
    if is_lite or (kernel is linear_attention) != isinstance(cache, LinearLayerCache):
        name = "lite" if is_lite else "linear" if kernel is linear_attention else "softmax"
        raise NotImplementedError(
            f"MultiHeadAttention: {name} attention does not read a {type(cache).__name__}. Linear attention "
            "reads a LinearLayerCache, softmax kernels read the other caches, lite attention reads none."
        )
    held = getattr(cache, "window", None)
    if held is not None and (window is None or window > held):
        raise ValueError(
            "MultiHeadAttention: a ring of a window must hold the layer's window; "
            f"got window={held}, attention_window={window}. Make the cache with that window, or with none."
        )


def attend_cache(kernel: Kernel, heads: Heads, cache: Any) -> tuple[Array, Any]:
    """The attention to the cache and the new tokens, and the cache with these appended."""
    assert heads.positions is not None
    empty = cache if isinstance(cache, EmptyCache) else None
    cache = cache if empty is None else empty.cache
    if isinstance(cache, LinearLayerCache):
        return _attend_sums(kernel, heads, heads.positions, cache)
    if empty is not None:  # the new tokens attend each other only, at indices
        positions = jnp.broadcast_to(heads.positions, (heads.query.shape[0], heads.query.shape[2]))
        real = padding(positions >= 0)
        out = kernel.attend(heads._replace(mask=real if heads.mask is None else heads.mask & real))
        cache = empty.store(heads.key, heads.value, positions)
        return _nan_where_lost(out, cache), cache

    mask = heads.mask
    if mask is not None:
        mask = mask_of_cache(mask, heads.positions, cache.num_positions)
        shape = (*heads.query.shape[:2], cache.num_positions, cache.num_positions)
        mask.check("MultiHeadAttention, with a cache", shape)
    cache, seen = cache.append(heads.key, heads.value, heads.positions)
    if _reads_chunks(kernel.function, heads.query.shape[2]):
        options = {name: x for name, x in _bound(kernel.function).items() if name in _CACHED_OPTIONS}
        read = functools.partial(cached_attention, heads.query, seen, heads.positions, **options)
        return kernel.call(functools.partial(read, mask=mask), heads), cache
    stored, score_mod = seen.tokens(heads.query.dtype), heads.score_mod
    mask = at_positions(mask, heads.positions, stored.positions)
    if score_mod is not None:
        score_mod = at_positions(score_mod, heads.positions, stored.positions)
    out = kernel.attend(heads._replace(key=stored.keys, value=stored.values, mask=mask, score_mod=score_mod))
    return _nan_where_lost(out, cache), cache


_CACHED_OPTIONS = inspect.signature(cached_attention).parameters
_FEW = SPARE_SLOTS + 1  # queries of a call that decodes, with a draft or without


def _reads_chunks(function: AttentionFn, num_queries: int) -> bool:
    """Whether `cached_attention` takes the place of a function that declares `reads_cache_in_chunks`.

    Many queries fill tiles, so a function with options of its own, such as a tile size, computes them itself.
    """
    has_options = isinstance(function, functools.partial)
    return getattr(kernel_of(function), "reads_cache_in_chunks", False) and (num_queries <= _FEW or not has_options)


def _bound(function: Any) -> dict[str, Any]:
    """The keywords that partials bind."""
    if not isinstance(function, functools.partial):
        return {}
    return _bound(function.func) | function.keywords


def _attend_sums(
    kernel: Kernel, heads: Heads, positions: Array, cache: LinearLayerCache
) -> tuple[Array, LinearLayerCache]:
    if not isinstance(heads.mask, Causal):
        raise NotImplementedError(
            "MultiHeadAttention: the sums of linear attention hold all tokens before, so with a cache mask must be "
            f"masks.causal(); got mask={heads.mask!r}. Use a softmax kernel for another mask."
        )
    mask = causal() & padding(jnp.broadcast_to(positions >= 0, (heads.query.shape[0], heads.query.shape[2])))
    function: Any = kernel.function
    attend = functools.partial(
        function, heads.query, heads.key, heads.value, mask=mask, state=cache.state, return_state=True
    )
    out, state = kernel.call(attend, heads)
    lengths = jnp.maximum(cache.lengths, positions.max(1, initial=-1) + 1)
    return out, LinearLayerCache(state, lengths)


def _nan_where_lost(out: Array, cache: Any) -> Array:
    """NaN where a write to the cache was dropped, which must not pass unseen."""
    return jnp.where(cache.overflowed.reshape(-1, 1, 1, 1), jnp.nan, out)
