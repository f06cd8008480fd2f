"""cached_attention: attention to the tokens in the cache of a layer, for any kind of cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.cache import SPARE_SLOTS, InSlots, StoredTokens
from attnax.checks import attention_options, check_attention, check_positions
from attnax.int8_rows import Int8Rows
from attnax.kernels._core.stored import SlotChunks, TokenArrays
from attnax.kernels._decode_call import DecodeCall, attend_tokens
from attnax.kernels.flash import flash_attention
from attnax.kernels.paged import attend_rows
from attnax.masks import Mask, as_mask, at_positions, mask_of_cache, resolve_masks, sliding_window
from attnax.paged_cache import PagedKVCache
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, Int, MaskMod, ScoreMod, ScoreShape, Shaped

__all__ = ["cached_attention"]

SlotCache = InSlots | StoredTokens
AnyCache = SlotCache | PagedKVCache

_FEW = SPARE_SLOTS + 1  # queries of a step with a draft; more queries fill the tiles of `flash_attention`
_CHUNK = 128  # slots that are read at once


def cached_attention(
    query: Float[ArrayLike, "B N T H"],
    cache: InSlots | StoredTokens | PagedKVCache,
    query_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ keys^T) @ values over the tokens of a cache, masks and score mods at true positions.

    Up to 17 queries read the slots in use chunk by chunk: the cost of a step follows the tokens in the cache, not its
    capacity, and one program serves every length. More queries go through `flash_attention`.

    Args:
        query: (batch, num_heads, T, head_dim), any floating dtype.
        cache: keys and values, also of the queries' own tokens: append first, then attend to the second result of
            `append`. In a ring with a window, queries attend only the window.
        query_positions: int32 (T,) or (batch, T), the index of each query in its row's text; -1 is padding, whose
            result has no meaning.
        mask: True to attend: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array. Column j of an
            array is position j; if it has fewer columns than max_len, later positions are not attended. Its rows are
            the T queries in order, or, if there are max_len of them, positions. An axis of size 1 holds for all.
        score_mod: `(scores, b, h, q, kv) -> scores` on the scaled scores; -inf counts as masked.
        dropout_rng: key of the attention dropout.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.

    Returns:
        (batch, num_heads, T, value_dim) in the dtype of query, and with `return_lse` the log-sum-exp (batch, num_heads,
        T). NaN where the cache has overflowed.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: a mask or score mod that mixes pairs; the reverse-mode derivative of a few queries, whose
            loop over chunks has a traced length: train without a cache.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import cached_attention, init_kv_layer_cache, masks, update_kv_layer_cache
        >>> x = jnp.ones((1, 2, 5, 8))
        >>> cache = update_kv_layer_cache(init_kv_layer_cache(1, 2, 8, max_len=64), x, x)
        >>> cached_attention(jnp.ones((1, 4, 1, 8)), cache, jnp.array([4]), mask=masks.causal()).shape
        (1, 4, 1, 8)
    """
    query = jnp.asarray(query)
    positions = _check_call(query, cache, query_positions)
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    # Which weights are dropped depends on positions, which the tiles of `flash_attention` do not know.
    by_chunks = query.shape[2] <= _FEW or (dropout_rate > 0.0 and not deterministic)
    if by_chunks and isinstance(cache, PagedKVCache):
        out, lse = attend_rows(query, cache, positions, options)
        return (out, lse) if return_lse else out
    score_shape = query.shape[0], query.shape[1], cache.num_positions, cache.num_positions
    if mask is not None:
        options["mask"] = mask_of_cache(as_mask(mask), positions, cache.num_positions)
        options["mask"].check("cached_attention, which reads masks at positions", score_shape)
    result: Any
    if by_chunks:
        assert not isinstance(cache, PagedKVCache)
        out, lse = _attend_slots(query, cache, positions, _in_window(cache, options), score_shape)
        result = (out, lse) if return_lse else out
    else:
        result = _attend_tiles(query, cache, positions, _in_window(cache, options), return_lse)
    lost = cache.overflowed.reshape(-1, 1, 1)  # a dropped write must not pass unseen
    return jax.tree.map(lambda x: jnp.where(lost if x.ndim == 3 else lost[..., None], jnp.nan, x), result)


def _check_call(query: Array, cache: Any, query_positions: Any) -> Array:
    """The positions of the queries, (batch, T); ValueError unless cache, query and positions fit together."""
    if not isinstance(cache, AnyCache):
        raise ValueError(
            "cached_attention: cache must hold tokens in slots (a KVLayerCache, a RingKVCache or another InSlots) or "
            f"be a StoredTokens or a PagedKVCache; got {type(cache).__name__}."
        )
    batch = (cache.seq_lengths if isinstance(cache, PagedKVCache) else cache.positions).shape[0]
    if query.ndim != 4 or query.shape[0] != batch:
        raise ValueError(
            f"cached_attention: query must be ({batch}, num_heads, T, head_dim), with the rows of the cache; "
            f"got query.shape={query.shape}."
        )
    seq_q = query.shape[2]
    positions = check_positions("cached_attention", "query_positions", query_positions, batch, seq_q)
    return jnp.broadcast_to(positions, (batch, seq_q))


def _in_window(cache: AnyCache, options: AttentionOptions) -> AttentionOptions:
    """The options, with the window of the cache in the mask."""
    if isinstance(cache, PagedKVCache) or cache.window is None:
        return options
    window, mask = sliding_window(cache.window, causal=False), options["mask"]
    return {**options, "mask": window if mask is None else mask & window}


def _attend_tiles(query: Array, cache: AnyCache, positions: Array, options: AttentionOptions, return_lse: bool) -> Any:
    """`flash_attention` to all slots of the cache."""
    stored_dtype = (cache.key_pool if isinstance(cache, PagedKVCache) else cache.keys).dtype
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(query.dtype, stored_dtype)  # stored tokens are not rounded to the query's dtype
    stored = cache.tokens(dtype)
    options = {**options, "mask": at_positions(options["mask"], positions, stored.positions)}
    if options["score_mod"] is not None:
        options["score_mod"] = at_positions(options["score_mod"], positions, stored.positions)
    attend: Any = flash_attention
    result = attend(query.astype(stored.keys.dtype), stored.keys, stored.values, return_lse=return_lse, **options)
    return (result[0].astype(query.dtype), result[1]) if return_lse else result.astype(query.dtype)


def _attend_slots(
    query: Array, cache: SlotCache, positions: Array, options: AttentionOptions, score_shape: ScoreShape
) -> tuple[Array, Array]:
    """(out, log-sum-exp) over the slots in use, chunk by chunk."""
    key, value = (jax.ShapeDtypeStruct(rows.shape, query.dtype) for rows in (cache.keys, cache.values))
    options, mask = options.copy(), options["mask"]
    options["mask"] = None  # was checked, against positions
    check_attention("cached_attention", query, key, value, **options)
    mask, score_mod = resolve_masks("cached_attention", mask, options["score_mod"], score_shape)
    chunk_size = min(cache.positions.shape[1], _CHUNK)
    out, lse = attend_tokens(
        DecodeCall(
            "cached_attention",
            query,
            positions,
            (SlotChunks(cache.keys, cache.values, cache.positions, cache.slots_in_use, chunk_size),),
            {**options, "mask": mask, "score_mod": score_mod},
            arrays=_token_arrays(cache),
        )
    )
    return out.astype(query.dtype), lse


def _token_arrays(cache: SlotCache) -> TokenArrays | None:
    """The slots without a copy; None if they hold 8-bit integers."""
    if isinstance(cache.keys, Int8Rows) or isinstance(cache.values, Int8Rows):
        return None
    return TokenArrays(cache.keys, cache.values, cache.positions, None)
