"""The attention of heads that a layer of one's own has projected."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnax.cache import LayerCache
from attnax.checks import check_attention, check_positions
from attnax.kernels.flash import flash_attention
from attnax.masks import Mask, as_mask
from attnax.nn._kernel import Heads, Kernel, attend_cache, check_cache
from attnax.nn._token_scalars import check_scalar_cache
from attnax.typing import Array, ArrayLike, AttentionFn, Float, Int, MaskMod, ScoreMod

__all__ = ["attend"]


def attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S Hv"],
    *,
    attention_fn: AttentionFn = flash_attention,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
    kv_cache: LayerCache | None = None,
) -> tuple[Float[Array, "B N T Hv"], Any]:
    """Attention of the heads of a layer of your own, with a cache of any kind or without one.

    Args:
        query: (batch, num_heads, T, head_dim), rotated if they are to be.
        key: (batch, num_kv_heads, S, head_dim); with a cache, of the same tokens as the queries.
        value: (batch, num_kv_heads, S, value_head_dim).
        attention_fn: as in `MultiHeadAttention`.
        mask: as in a call of `MultiHeadAttention`.
        score_mod: as in a call of `MultiHeadAttention`.
        scale: of the scores, by default head_dim ** -0.5.
        position_ids: of the queries, for the cache, by default those after the cache; -1 is padding.
        kv_cache: keys and values are appended, and the queries attend all of it.

    Returns:
        (batch, num_heads, T, value_head_dim), and the new cache or None.

    Raises:
        ValueError: arguments that do not fit together, a ScalarCache, or a cache with a window but no sinks.
        NotImplementedError: the attention function does not read such a cache.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import masks
        >>> from attnax.cache import init_kv_layer_cache
        >>> from attnax.nn import attend
        >>> x = jnp.ones((1, 2, 3, 4))
        >>> out, cache = attend(x, x, x, mask=masks.causal(), kv_cache=init_kv_layer_cache(1, 2, 4, max_len=5))
        >>> out.shape, int(cache.length)
        ((1, 2, 3, 4), 3)
    """
    # With a cache, the columns of a mask are positions.
    read_now = mask if kv_cache is None else None
    check_attention("attend", query, key, value, mask=read_now, score_mod=score_mod, scale=scale)
    batch, length = query.shape[0], query.shape[2]
    positions: Any = None
    if position_ids is not None:
        positions = check_positions("attend", "position_ids", position_ids, batch, length)
    kernel = Kernel(attention_fn, 0.0, scale, None)
    heads = Heads(query, key, value, None if mask is None else as_mask(mask), score_mod, None, positions)
    if kv_cache is None:
        return kernel.attend(heads), None
    check_cache("attend", attention_fn, kv_cache, None)
    check_scalar_cache("attend", kv_cache, 0)
    if key.shape[2] != length:
        raise ValueError(
            f"attend: with a cache keys must be those of the queries' tokens; got {key.shape[2]} keys for {length} "
            "queries."
        )
    if positions is None:
        positions = kv_cache.next_positions()[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return attend_cache(kernel, heads._replace(positions=positions), kv_cache)
