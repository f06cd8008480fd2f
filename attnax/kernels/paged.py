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
from jax import lax

from attnax.checks import attention_options, check_attention, check_positions, is_concrete
from attnax.int8_rows import Int8Rows
from attnax.kernels._core.stored import Chunk, SlotChunks, Source, TokenArrays
from attnax.kernels._decode_call import DecodeCall, attend_tokens
from attnax.masks import Mask, as_mask, mask_of_cache, resolve_masks, takes_mask_objects
from attnax.paged_cache import PagedKVCache, Pool
from attnax.paged_cache.pool import read_blocks
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, Int, MaskMod, ScoreMod, Shaped

__all__ = ["paged_attention"]

_CHUNK = 128  # keys that are read at once, in whole pages


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

    Tokens are read in chunks of about 128. A chunk is skipped if it is not in use, or if no query may attend it. Shapes
    do not depend on lengths or block tables, so one compiled program serves all. Besides the arguments, a call needs
    memory for one chunk and its scores, (batch, num_heads, T, 128).

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
    if sequence_idx is None:
        out, lse = attend_rows(query, cache, query_positions, options, new=new)
    else:
        _check_query(query, cache, sequence_idx)
        row = jnp.asarray(sequence_idx, jnp.int32)[None]
        out, lse = attend_rows(query[None], cache, query_positions, options, rows=row)
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def attend_rows(
    query: Array,
    cache: PagedKVCache,
    query_positions: ArrayLike | None,
    options: AttentionOptions,
    *,
    rows: Array | None = None,
    new: tuple[Any, Any] | None = None,
) -> tuple[Array, Array]:
    """(out, log-sum-exp) of query (B, N, T, H) over the tokens of B rows of the cache, and over new tokens.

    `options` holds every option, as the caller gave it. `rows` are (B,) rows of the cache, None for all; `new` is key
    and value of the new tokens.
    """
    num_rows = cache.seq_lengths.shape[0]
    if rows is None:
        _check_query(query, cache, None)
    else:
        cache = _only(rows, cache)
    num_heads = query.shape[1]
    key, value = _new_tokens(query, cache, new)
    mask, checked = options["mask"], options.copy()
    if isinstance(mask, jax.Array | np.ndarray):  # its shape must fit the positions, which `resolve_masks` checks
        checked["mask"] = np.zeros((), mask.dtype)
    check_attention("paged_attention", query, key, value, **checked)
    positions = _positions_of(query, cache, query_positions, has_new=new is not None)
    num_positions = cache.max_len + key.shape[2]
    if mask is not None:
        _check_columns(mask, cache, new)
        mask = mask_of_cache(as_mask(mask), positions, num_positions)
    mask, score_mod = resolve_masks(
        "paged_attention, which reads masks and score mods at the positions of cached and new tokens",
        mask,
        options["score_mod"],
        (num_rows, num_heads, num_positions, num_positions),
    )
    b = jnp.arange(num_rows, dtype=jnp.int32) if rows is None else rows
    sources: list[Source] = [_pages_to_read(mask, cache, b, positions, num_heads)]
    if new is not None:
        num_new = key.shape[2]
        new_positions = cache.seq_lengths[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
        sources.append(SlotChunks(key, value, new_positions, jnp.int32(num_new), min(num_new, _CHUNK)))
    out, lse = attend_tokens(
        DecodeCall(
            "paged_attention",
            query,
            positions,
            tuple(sources),
            {**options, "mask": mask, "score_mod": score_mod},
            b=rows,
            arrays=_token_arrays(cache) if new is None else None,
        )
    )
    lost = cache.overflowed[:, None, None]  # a dropped write must not pass unseen
    return jnp.where(lost[..., None], jnp.nan, out).astype(query.dtype), jnp.where(lost, jnp.nan, lse)


@pytree_dataclass
class PageChunks:
    """The pages of a cache, in chunks."""

    cache: PagedKVCache
    needed: Array  # (B, C), the chunks that a row may attend
    order: Array  # (C,), all chunks; the chunks that some row may attend come first
    num_chunks: Array  # the number of chunks that some row may attend

    @classmethod
    def of(cls, cache: PagedKVCache, needed: Array) -> PageChunks:
        """The chunks that some row may attend."""
        some = needed.any(0)
        return cls(cache, needed, jnp.argsort(~some, stable=True), some.sum(dtype=jnp.int32))

    @property
    def row_lengths(self) -> Array | None:
        return self.cache.seq_lengths

    def of_rows(self, rows: Array) -> PageChunks:
        return PageChunks.of(_rows_of(self.cache, rows), self.needed[rows])

    @property
    def chunk_size(self) -> int:
        return _pages_in_chunk(self.cache) * self.cache.block_size

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.cache.value_pool.shape[1], self.cache.value_pool.shape[3]

    def chunk(self, n: Array) -> Chunk:
        cache, count, block_size = self.cache, _pages_in_chunk(self.cache), self.cache.block_size
        chunk = self.order[n]
        table = jnp.pad(cache.block_table, ((0, 0), (0, -cache.block_table.shape[1] % count)), constant_values=-1)
        blocks = lax.dynamic_slice_in_dim(table, chunk * count, count, axis=1)
        position = chunk.astype(jnp.int32) * (count * block_size) + jnp.arange(count * block_size, dtype=jnp.int32)
        exists = jnp.repeat(blocks >= 0, block_size, axis=1) & (position[None] < cache.seq_lengths[:, None])

        def read(pool: Pool) -> Array:
            # Page -1 is masked, so page 0 is read in its place.
            return read_blocks(pool, jnp.maximum(blocks, 0))

        return Chunk(
            jnp.broadcast_to(position, exists.shape)[:, None, None],
            exists[:, None, None],
            lambda: (read(cache.key_pool), read(cache.value_pool)),
        )


def _positions_of(query: Array, cache: PagedKVCache, given: ArrayLike | None, *, has_new: bool) -> Array:
    """The positions (B, T) of the queries: as given, or by default the last positions."""
    batch, _, seq_q, _ = query.shape
    if given is not None:
        positions = check_positions("paged_attention", "query_positions", given, batch, seq_q)
        return jnp.broadcast_to(positions, (batch, seq_q))
    starts = cache.seq_lengths if has_new else cache.seq_lengths - seq_q
    return starts[:, None] + jnp.arange(seq_q, dtype=jnp.int32)[None]


def _pages_to_read(
    mask: Mask | None, cache: PagedKVCache, rows: Array, q_positions: Array, num_heads: int
) -> PageChunks:
    """The chunks of the cache; the chunks that some row may attend come first."""
    count = _pages_in_chunk(cache)
    size = count * cache.block_size
    first = jnp.arange(-(-cache.block_table.shape[1] // count), dtype=jnp.int32)[None, None] * size
    needed = first < cache.seq_lengths[:, None, None]
    if mask is not None and q_positions.shape[1]:
        present = jnp.where(q_positions < 0, q_positions.max(1, keepdims=True), q_positions)
        q_range = present.min(1)[:, None, None], present.max(1)[:, None, None]
        h = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
        some, _ = mask.tile(rows[:, None, None], h, q_range, (first, first + size - 1))
        needed = needed & some
    return PageChunks.of(cache, needed.any(1))


def _token_arrays(cache: PagedKVCache) -> TokenArrays | None:
    """The pages without a copy; None if they hold 8-bit integers."""
    if isinstance(cache.key_pool, Int8Rows) or isinstance(cache.value_pool, Int8Rows):
        return None
    index = jnp.arange(cache.max_len, dtype=jnp.int32)[None]
    exists = jnp.repeat(cache.block_table >= 0, cache.block_size, axis=1) & (index < cache.seq_lengths[:, None])
    return TokenArrays(cache.key_pool, cache.value_pool, jnp.where(exists, index, -1), cache.block_table)


def _pages_in_chunk(cache: PagedKVCache) -> int:
    return min(cache.block_table.shape[1], max(1, _CHUNK // cache.block_size))


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


def _check_columns(mask: Any, cache: PagedKVCache, new: tuple[Any, Any] | None) -> None:
    """Raises ValueError for an array over the new tokens alone if there are tokens in the cache."""
    if new is None or not isinstance(mask, jax.Array | np.ndarray) or not is_concrete(cache.seq_lengths):
        return
    if mask.ndim and 1 < mask.shape[-1] == new[0].shape[2] and cache.seq_lengths.max(initial=0) > 0:
        raise ValueError(
            "paged_attention: columns of an array are positions, and tokens in the cache come before the new ones; "
            f"got mask.shape={mask.shape} for {new[0].shape[2]} new tokens behind "
            f"seq_lengths={cache.seq_lengths.tolist()}. Pass a Mask or a function, or an array over all positions."
        )


def _only(rows: Array, cache: PagedKVCache) -> PagedKVCache:
    """The cache with these rows alone; a row that does not exist counts as overflowed."""
    missing = (rows < 0) | (rows >= cache.seq_lengths.shape[0])
    cache = _rows_of(cache, rows)
    return dataclasses.replace(cache, overflowed=cache.overflowed | missing)


def _rows_of(cache: PagedKVCache, rows: Array) -> PagedKVCache:
    """The cache with these rows alone, over the same pools."""
    table, lengths, overflowed = (x[rows] for x in (cache.block_table, cache.seq_lengths, cache.overflowed))
    return dataclasses.replace(cache, block_table=table, seq_lengths=lengths, overflowed=overflowed)


def _new_tokens(query: Array, cache: PagedKVCache, new: tuple[Any, Any] | None) -> tuple[Array, Array]:
    """Key and value of the new tokens, of length 0 if there are none; ValueError if they do not fit query and cache."""
    pools = cache.key_pool, cache.value_pool
    batch, _, seq_q, _ = query.shape
    if new is None:
        key, value = (jnp.zeros((batch, pool.shape[1], 0, pool.shape[3]), query.dtype) for pool in pools)
        return key, value
    key, value = (jnp.asarray(x) for x in new)
    want = [(batch, pool.shape[1], seq_q, pool.shape[3]) for pool in pools]
    if [key.shape, value.shape] != want:
        raise ValueError(
            "paged_attention: key and value must hold the tokens of query, in the heads and sizes of the cache, "
            f"{want[0]} and {want[1]}; got key.shape={key.shape}, value.shape={value.shape}."
        )
    return key, value
