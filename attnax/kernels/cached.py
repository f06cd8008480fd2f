"""cached_attention: attention to what a layer's cache holds, of whatever kind the cache is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import SPARE_SLOTS, KVLayerCache, RingKVCache, StoredTokens
from attnax.checks import check_attention, check_positions
from attnax.int8_rows import Int8Rows, Rows, decode_rows
from attnax.kernels._core.stored import Chunk, Stored
from attnax.kernels._decode_call import attend_chunks
from attnax.kernels.flash import flash_attention
from attnax.kernels.paged import paged_attention
from attnax.masks import Mask, as_mask, at_positions, mask_of_cache, resolve_masks, sliding_window
from attnax.paged_cache import PagedKVCache
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Float, Int, MaskMod, ScoreMod, Shaped

__all__ = ["cached_attention"]

_FEW = SPARE_SLOTS + 1  # queries, those of a draft among them; more of them fill the tiles of `flash_attention`
_CHUNK = 128  # slots that are read at once


def cached_attention(
    query: Float[ArrayLike, "B N T H"],
    cache: KVLayerCache | RingKVCache | StoredTokens | PagedKVCache,
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

    A few queries (up to 17) read the slots in use chunk by chunk, so that a step costs what the cache holds, not what
    it could hold, and one program serves every length. More go through `flash_attention`.

    Args:
        query: (batch, num_heads, T, head_dim), any floating dtype.
        cache: holds keys and values, those of the queries' own tokens included (append first, then attend what `append`
            gives). A ring of a window lets queries attend that window only.
        query_positions: int32 (T,) or (batch, T), the index of each query in its row's text; -1 is padding, whose
            result holds no meaning.
        mask: True to attend: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array. Column j of an
            array is position j; if it has fewer columns than max_len, positions beyond them are not attended. Its rows
            are the T queries in order; max_len rows are positions. An axis of size 1 holds for all.
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
        NotImplementedError: a mask or score mod that mixes pairs; the reverse-mode derivative of a few queries, which
            are computed by a loop of unknown length: train without a cache.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import cached_attention, init_kv_layer_cache, masks, update_kv_layer_cache
        >>> x = jnp.ones((1, 2, 5, 8))
        >>> cache = update_kv_layer_cache(init_kv_layer_cache(1, 2, 8, max_len=64), x, x)
        >>> cached_attention(jnp.ones((1, 4, 1, 8)), cache, jnp.array([4]), mask=masks.causal()).shape
        (1, 4, 1, 8)
    """
    query = jnp.asarray(query)
    if not isinstance(cache, KVLayerCache | RingKVCache | StoredTokens | PagedKVCache):
        raise ValueError(
            f"cached_attention: cache must hold tokens; got {type(cache).__name__}. Use a KVLayerCache, a RingKVCache "
            "or a PagedKVCache."
        )
    batch = (cache.seq_lengths if isinstance(cache, PagedKVCache) else cache.positions).shape[0]
    if query.ndim != 4 or query.shape[0] != batch:
        raise ValueError(
            f"cached_attention: query must be ({batch}, num_heads, T, head_dim), with the rows of the cache; "
            f"got query.shape={query.shape}."
        )
    seq_q = query.shape[2]
    positions = jnp.broadcast_to(
        check_positions("cached_attention", "query_positions", query_positions, batch, seq_q), (batch, seq_q)
    )
    options: dict[str, Any] = {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate, "deterministic": deterministic}
    options |= {"scale": scale, "return_lse": return_lse}
    # Which weights are dropped goes by positions, which the tiles of `flash_attention` do not know.
    by_chunks = seq_q <= _FEW or (dropout_rate > 0.0 and not deterministic)
    if isinstance(cache, PagedKVCache) and by_chunks:
        options |= {"mask": mask, "score_mod": score_mod, "query_positions": positions}
        return paged_attention(query, cache, **options)
    full = (batch, query.shape[1], cache.num_positions, cache.num_positions)
    if mask is not None:
        mask = mask_of_cache(as_mask(mask), positions, cache.num_positions)
        mask.check("cached_attention, which reads masks at positions", full)
    if not isinstance(cache, PagedKVCache) and cache.window is not None:
        window = sliding_window(cache.window, causal=False)
        mask = window if mask is None else mask & window
    result: Any
    if not by_chunks:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(query.dtype, _stored_dtype(cache))  # as they are kept, not rounded to the query
        stored = cache.tokens(dtype)
        mask = at_positions(mask, positions, stored.positions)
        score_mod = None if score_mod is None else at_positions(score_mod, positions, stored.positions)
        arrays: tuple[Any, ...] = query.astype(stored.keys.dtype), stored.keys, stored.values
        result = flash_attention(*arrays, mask=mask, score_mod=score_mod, **options)
        result = (result[0].astype(query.dtype), result[1]) if return_lse else result.astype(query.dtype)
    else:
        assert not isinstance(cache, PagedKVCache)
        result = _attend_slots(query, cache, positions, mask, score_mod, full, **options)
    lost = cache.overflowed.reshape(-1, 1, 1)  # a dropped write must not pass unseen
    if return_lse:
        return jnp.where(lost[..., None], jnp.nan, result[0]), jnp.where(lost, jnp.nan, result[1])
    return jnp.where(lost[..., None], jnp.nan, result)


def _attend_slots(
    query: Array,
    cache: KVLayerCache | RingKVCache | StoredTokens,
    positions: Array,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    full: tuple[Any, ...],
    *,
    dropout_rng: Array | None,
    dropout_rate: float,
    deterministic: bool,
    scale: Any,
    return_lse: bool,
) -> Any:
    shapes = (jax.ShapeDtypeStruct(rows.shape, query.dtype) for rows in (cache.keys, cache.values))
    options: dict[str, Any] = {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate, "deterministic": deterministic}
    check_attention("cached_attention", query, *shapes, score_mod=score_mod, scale=scale, **options)
    mask, score_mod = resolve_masks("cached_attention", mask, score_mod, full)
    slots = Slots(cache.keys, cache.values, cache.positions, cache.slots_in_use, min(cache.positions.shape[1], _CHUNK))
    out, lse = attend_chunks(
        "cached_attention",
        query,
        scale,
        (slots,),
        positions,
        rows=None,
        mask=mask,
        score_mod=score_mod,
        dropout_rng=dropout_rng,
        dropout_rate=0.0 if deterministic else dropout_rate,
        stored=None
        if isinstance(cache.keys, Int8Rows) or isinstance(cache.values, Int8Rows)
        else Stored(cache.keys, cache.values, cache.positions, None),
    )
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


def _stored_dtype(cache: KVLayerCache | RingKVCache | StoredTokens | PagedKVCache) -> Any:
    return (cache.key_pool if isinstance(cache, PagedKVCache) else cache.keys).dtype


@pytree_dataclass
class Slots:
    """The slots of a cache whose tokens lie in place, in chunks."""

    keys: Rows  # (B, K, S, H)
    values: Rows  # (B, K, S, V)
    positions: Array  # (B, S); -1 is no token
    in_use: Array  # slots from here on are empty
    chunk_size: int = dataclasses.field(metadata={"static": True})

    @property
    def num_chunks(self) -> Array:
        return -(-self.in_use // self.chunk_size)

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[3]

    def chunk(self, n: Any) -> Chunk:
        size, length = self.chunk_size, self.keys.shape[2]
        # Past the end a slice would start earlier: what it then reads again does not count.
        start = n * size
        first = jnp.minimum(start, length - size)

        def cut(x: Array, axis: int) -> Array:
            return x if size == length else lax.dynamic_slice_in_dim(x, first, size, axis)

        position = cut(self.positions, 1)
        exists = (position >= 0) & (first + jnp.arange(size, dtype=jnp.int32) >= start)[None]

        def read() -> tuple[Array, Array]:
            keys, values = jax.tree.map(lambda x: cut(x, 2), (self.keys, self.values))
            return decode_rows(keys, self.keys.dtype), decode_rows(values, self.values.dtype)

        return Chunk(jnp.maximum(position, 0)[:, None, None], exists[:, None, None], read)
