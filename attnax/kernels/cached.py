"""cached_attention: attention to the tokens in the cache of a layer, for any kind of cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.cache import FEW_QUERIES, StoresTokens, nan_where_lost
from attnax.checks import attention_options, check_positions
from attnax.kernels._decode_call import attend_stored, stored_mask
from attnax.kernels.flash import flash_attention
from attnax.masks import Mask, at_positions
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, Int, MaskMod, ScoreMod, Shaped

__all__ = ["cached_attention"]


def cached_attention(
    query: Float[ArrayLike, "B N T H"],
    cache: StoresTokens,
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
            `append`. In a ring with a window, queries attend only the window and the sinks of the ring.
        query_positions: int32 (T,) or (batch, T), the index of each query in its row's text; -1 is padding, whose
            result has no meaning.
        mask: True to attend, by default all tokens in the cache, later ones too: a Mask, a function
            `(b, h, q, kv) -> bool`, or a boolean array. Column j of an array is position j; if it has fewer columns
            than max_len, later positions are not attended. Its rows are the T queries in order, or, if there are
            max_len of them, positions. An axis of size 1 holds for all.
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
    if query.shape[2] <= FEW_QUERIES or (dropout_rate > 0.0 and not deterministic):
        out, lse = attend_stored("cached_attention", query, cache, positions, options)
        return (out, lse) if return_lse else out
    return nan_where_lost(_attend_tiles(query, cache, positions, options, return_lse), cache)


def _check_call(query: Array, cache: Any, query_positions: Any) -> Array:
    """The positions of the queries, (batch, T); ValueError unless cache, query and positions fit together."""
    if not isinstance(cache, StoresTokens):
        raise ValueError(
            "cached_attention: cache must store tokens (a KVLayerCache, a RingKVCache, a PagedKVCache, a StoredTokens "
            f"or another StoresTokens); got {type(cache).__name__}."
        )
    if query.ndim != 4 or query.shape[0] != cache.num_rows:
        raise ValueError(
            f"cached_attention: query must be ({cache.num_rows}, num_heads, T, head_dim), with the rows of the cache; "
            f"got query.shape={query.shape}."
        )
    batch, _, seq_q, _ = query.shape
    positions = check_positions("cached_attention", "query_positions", query_positions, batch, seq_q)
    return jnp.broadcast_to(positions, (batch, seq_q))


def _attend_tiles(
    query: Array, cache: StoresTokens, positions: Array, options: AttentionOptions, return_lse: bool
) -> Any:
    """`flash_attention` to all slots of the cache."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(query.dtype, cache.key_value[0].dtype)  # stored tokens are not rounded
    score_shape = query.shape[0], query.shape[1], cache.num_positions, cache.num_positions
    mask = stored_mask(
        "cached_attention, which reads masks at positions", cache, options["mask"], positions, score_shape
    )
    stored = cache.tokens(dtype)
    options = {**options, "mask": at_positions(mask, positions, stored.positions)}
    if options["score_mod"] is not None:
        options["score_mod"] = at_positions(options["score_mod"], positions, stored.positions)
    attend: Any = flash_attention
    result = attend(query.astype(stored.keys.dtype), stored.keys, stored.values, return_lse=return_lse, **options)
    return (result[0].astype(query.dtype), result[1]) if return_lse else result.astype(query.dtype)
