"""paged_attention: attention to the tokens of a `PagedKVCache`, read from its pages.

The pages of a row are gathered a chunk at a time, never a whole row or the pool. The number of chunks is a traced
value, see `_decode_call.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from attnax.cache import StoredTokens
from attnax.checks import attention_options, check_positions, is_concrete
from attnax.kernels._decode_call import attend_stored
from attnax.masks import Mask, takes_mask_objects
from attnax.paged_cache import PagedKVCache
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, Int, MaskMod, ScoreMod, Shaped

__all__ = ["paged_attention"]


class PagedOptions(AttentionOptions, total=False):
    """The keywords of `paged_attention` in every form, except `return_lse`."""

    query_positions: ArrayLike | None


class _Out(PagedOptions, total=False):
    return_lse: Literal[False]


class _OutAndLse(PagedOptions):
    return_lse: Literal[True]


@overload
def paged_attention(
    query: ArrayLike, cache: PagedKVCache, sequence_idx: int | ArrayLike | None = ..., **options: Unpack[_Out]
) -> Array: ...
@overload
def paged_attention(
    query: ArrayLike, cache: PagedKVCache, sequence_idx: int | ArrayLike | None = ..., **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@overload
def paged_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, /, *, cache: PagedKVCache, **options: Unpack[_Out]
) -> Array: ...
@overload
def paged_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, /, *, cache: PagedKVCache, **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@takes_mask_objects
def paged_attention(
    query: Float[ArrayLike, "*batch N T H"],
    *arguments: Any,
    cache: PagedKVCache | None = None,
    sequence_idx: int | Int[ArrayLike, ""] | None = None,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    query_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None,
) -> Float[Array, "*batch N T Hv"] | tuple[Float[Array, "*batch N T Hv"], Float[Array, "*batch N T"]]:
    """softmax(scale * query @ keys^T) @ values, over the tokens that each row of a paged cache holds.

    There are three forms of a call:

    - `paged_attention(query, cache, sequence_idx)`: query (num_heads, T, head_dim) of one row of the cache;
    - `paged_attention(query, cache)`: query (batch, num_heads, T, head_dim), all rows, each with its own length;
    - `functools.partial(paged_attention, cache=cache)` is an `attnax.AttentionFn`, for example for
      `MultiHeadAttention`. Query, key and value belong to T new tokens, which follow the tokens in the cache; queries
      attend both. The new tokens are **not** written to the cache; `append_rows` writes tokens.

    Masks and score mods see true positions: the position of a key is its index within its row's own text. In the first
    two forms the queries are the last T tokens in the cache (append first, then attend): query i of row b is at
    `seq_lengths[b] - T + i`. In the third form query i is at `seq_lengths[b] + i`. So `mask=causal()` is right for
    prefill in any chunks; without a mask every token is attended. If T exceeds a row's length, its first queries are
    padding, which attends nothing under a mask.

    Tokens are read in chunks of about 128. A chunk is skipped if it is not in use, or if no query may attend it. More
    than 8 rows are sorted by length and read in groups of 8, so that a group ends with its own longest row. Rows on
    several devices are read by their devices in a `jax.shard_map`; where a mesh shards them otherwise, every device
    reads all rows. Shapes do not depend on lengths or block tables, so one compiled program serves all. Besides the
    arguments, a call needs memory for one chunk and its scores, (8 rows or fewer, num_heads, T, 128).

    Args:
        query: any floating dtype; num_heads is a multiple of the cache's num_kv_heads.
        *arguments: cache and sequence_idx, or key (batch, num_kv_heads, T, head_dim) and value
            (batch, num_kv_heads, T, value_dim) in the dtype of query.
        cache: its pools may have another floating dtype. The result of a row whose `overflowed` is set is NaN.
        sequence_idx: row of the cache, an integer or an integer scalar, and the b of masks and score mods. A traced
            index of no row gives NaN.
        mask: True to attend: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array. Column j of an array is
            position j; if it has fewer columns than max_len (in the third form max_len + T), later positions are not
            attended. Its rows are the T queries in order, or, if there are max_len (max_len + T) of them, positions. An
            axis of size 1 holds for all. In the third form an array over the T new tokens alone is refused if the cache
            is known to hold tokens: pass a Mask or a function. A query with nothing to attend gives 0.
        score_mod: `(scores, b, h, q, kv) -> scores` on the scaled scores; -inf counts as masked.
        dropout_rng: key of the attention dropout, needed when `deterministic` is False and the rate is above 0.
        dropout_rate: probability of dropping each attention weight; b, h and positions decide which are dropped.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.
        query_positions: (T,) or (batch, T), in place of the positions above; -1 is padding, which attends nothing under
            a mask.

    Returns:
        The shape of query with value_dim last, in its dtype, and with `return_lse` the log-sum-exp without that axis,
        -inf where nothing is attended. Scores, softmax, sums and log-sum-exp are in float32 (float64 for float64). A
        NaN or infinity in a token makes the queries that may attend it NaN. The contents of unused slots and of the
        pages of other rows have no effect.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, a row that does not exist.
        NotImplementedError: a mask or score mod that mixes pairs; reverse-mode derivatives, since the loop over chunks
            has a traced length: train with `attnax.memory_efficient_attention`, for example on the result of
            `gather_rows`. Forward mode works.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from attnax import masks
        >>> from attnax.kernels.paged import paged_attention
        >>> from attnax.paged_cache import allocate_rows, append_rows, init_paged_kv_cache
        >>> cache = init_paged_kv_cache(
        ...     num_blocks=7, block_size=4, num_kv_heads=2, head_dim=3, batch_size=2, max_blocks_per_seq=3
        ... )
        >>> x = jnp.ones((2, 2, 6, 3))
        >>> cache = append_rows(allocate_rows(cache, jnp.array([6, 2])), x, x, jnp.array([6, 2]))
        >>> paged_attention(jnp.ones((4, 1, 3)), cache, sequence_idx=1).shape
        (4, 1, 3)
        >>> paged_attention(jnp.ones((2, 4, 1, 3)), cache, mask=masks.causal()).shape
        (2, 4, 1, 3)
        >>> attention_fn = functools.partial(paged_attention, cache=cache)
        >>> attention_fn(jnp.ones((2, 4, 5, 3)), x[:, :, :5], x[:, :, :5], mask=masks.causal()).shape
        (2, 4, 5, 3)

    References:
        W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
        https://arxiv.org/abs/2309.06180.
    """
    cache, sequence_idx, new = _call_form(arguments, cache, sequence_idx)
    query = jnp.asarray(query)
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    _check_query(query, cache, sequence_idx)
    row = None
    if sequence_idx is not None:
        query, row = query[None], (jnp.asarray(sequence_idx, jnp.int32)[None], cache.num_rows)
        cache = _only(row[0], cache)
    tokens = None if new is None else _new_tokens(query, cache, new)
    if tokens is not None:
        _check_columns(mask, cache, tokens)
    positions = _positions_of(query, cache, query_positions, has_new=new is not None)
    out, lse = attend_stored("paged_attention", query, cache, positions, options, rows=row, new=tokens)
    if sequence_idx is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _positions_of(query: Array, cache: PagedKVCache, given: ArrayLike | None, *, has_new: bool) -> Array:
    """The positions (B, T) of the queries: as given, or by default the last positions."""
    batch, _, seq_q, _ = query.shape
    if given is not None:
        positions = check_positions("paged_attention", "query_positions", given, batch, seq_q)
        return jnp.broadcast_to(positions, (batch, seq_q))
    starts = cache.seq_lengths if has_new else cache.seq_lengths - seq_q
    return starts[:, None] + jnp.arange(seq_q, dtype=jnp.int32)[None]


def _call_form(
    arguments: tuple[Any, ...], cache: PagedKVCache | None, sequence_idx: Any
) -> tuple[PagedKVCache, Any, tuple[Any, Any] | None]:
    """(cache, sequence_idx, key and value of the new tokens) of a call in one of the three forms."""
    match arguments, cache, sequence_idx:
        case (PagedKVCache() as cache,), None, _:
            return cache, sequence_idx, None
        case (PagedKVCache() as cache, index), None, None:
            return cache, index, None
        case (), PagedKVCache(), _:
            return cache, sequence_idx, None
        case (key, value), PagedKVCache(), None:
            return cache, None, (key, value)
    got = ", ".join(type(x).__name__ for x in arguments)
    raise ValueError(
        "paged_attention: it is called with (query, cache), (query, cache, sequence_idx) or (query, key, value, "
        f"cache=cache), the cache being a PagedKVCache; got ({got}) behind query, cache={type(cache).__name__}, "
        f"sequence_idx={sequence_idx}."
    )


def _check_query(query: Array, cache: PagedKVCache, sequence_idx: Any) -> None:
    """Raises ValueError unless query and index fit the cache."""
    num_rows, head_dim = cache.seq_lengths.shape[0], cache.key_pool.shape[3]
    axes = "(batch, num_heads, seq_q, head_dim) of all rows of the cache"
    if sequence_idx is not None:
        axes = "(num_heads, seq_q, head_dim) of one row of the cache"
        is_integer = jnp.ndim(sequence_idx) == 0 and jnp.issubdtype(jnp.result_type(sequence_idx), jnp.integer)
        if not is_integer or (is_concrete(sequence_idx) and not 0 <= int(sequence_idx) < num_rows):
            raise ValueError(
                f"paged_attention: sequence_idx must be an integer between 0 and {num_rows - 1}; "
                f"got sequence_idx={sequence_idx}."
            )
    if query.ndim != (4 if sequence_idx is None else 3):
        raise ValueError(
            f"paged_attention: query must be {axes}; got query.shape={query.shape}. "
            "Give a sequence_idx for one row, none for all rows."
        )
    if sequence_idx is None and query.shape[0] != num_rows:
        raise ValueError(
            f"paged_attention: query must have the {num_rows} rows of the cache; got query.shape={query.shape}. "
            "Give a sequence_idx to attend to one of them."
        )
    if query.shape[-1] != head_dim:
        raise ValueError(
            f"paged_attention: query must have the head_dim of the cache; got query.shape={query.shape}, "
            f"key_pool.shape={cache.key_pool.shape}."
        )
    dtypes = query.dtype, cache.key_pool.dtype, cache.value_pool.dtype
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            "paged_attention: query and the pools of the cache must be floating; got {}, {} and {}.".format(*dtypes)
        )


def _check_columns(mask: Any, cache: PagedKVCache, new: StoredTokens) -> None:
    """Raises ValueError for an array over the new tokens alone if there are tokens in the cache."""
    if not isinstance(mask, jax.Array | np.ndarray) or not is_concrete(cache.seq_lengths):
        return
    num_new = new.positions.shape[1]
    if mask.ndim and 1 < mask.shape[-1] == num_new and cache.seq_lengths.max(initial=0) > 0:
        raise ValueError(
            "paged_attention: columns of an array are positions, and tokens in the cache come before the new ones; "
            f"got mask.shape={mask.shape} for {num_new} new tokens behind "
            f"seq_lengths={cache.seq_lengths.tolist()}. Pass a Mask or a function, or an array over all positions."
        )


def _only(rows: Array, cache: PagedKVCache) -> PagedKVCache:
    """The cache with these rows alone, over the same pools; a row that does not exist counts as overflowed."""
    missing = (rows < 0) | (rows >= cache.num_rows)
    table, lengths, overflowed = (x[rows] for x in (cache.block_table, cache.seq_lengths, cache.overflowed))
    return dataclasses.replace(cache, block_table=table, seq_lengths=lengths, overflowed=overflowed | missing)


def _new_tokens(query: Array, cache: PagedKVCache, new: tuple[Any, Any]) -> StoredTokens:
    """Key and value of the new tokens, which follow the tokens in the cache; ValueError if they do not fit."""
    key, value = (jnp.asarray(x) for x in new)
    batch, _, seq_q, _ = query.shape
    want = [(batch, x.shape[0], seq_q, x.shape[1]) for x in cache.key_value]
    if [key.shape, value.shape] != want:
        raise ValueError(
            "paged_attention: key and value must hold the tokens of query, in the heads and sizes of the cache, "
            f"{want[0]} and {want[1]}; got key.shape={key.shape}, value.shape={value.shape}."
        )
    return StoredTokens(key, value, cache.seq_lengths[:, None] + jnp.arange(seq_q, dtype=jnp.int32)[None])
