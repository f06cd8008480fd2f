"""A few queries over many stored tokens on any platform, a chunk of tokens at a time.

The loop over chunks has a traced length, so a step's work follows the tokens in use. Rows of different lengths are
sorted and read in groups: a long row does not make all others wait for its chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import Source
from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.no_reverse import without_reverse
from attnax.kernels._core.softmax import SoftmaxState
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["ChunkFunctions", "Queries", "attend_chunks", "rows_at_once"]

_GROUP = 8  # rows that are read together, if rows differ in length


@pytree_dataclass
class Queries:
    """The queries, and the indices at which masks and score mods see them."""

    query: Array  # (B, N, T, H), scaled
    b: Array  # (B,)
    positions: Array  # (B, T); a negative position is padding and attends nothing
    dropout: Array | None  # the words of `keep_weights`


@pytree_dataclass
class ChunkFunctions:
    """The mask and the score mod, for chunks of a source."""

    mask: Lifted | None  # (b, h, q, kv) -> keep
    score_mod: Lifted | None  # (scores, b, h, q, kv) -> scores


def rows_at_once(sources: tuple[Any, ...], batch: int) -> int:
    """The rows that `attend_chunks` reads together."""
    is_known = isinstance(batch, int)  # it is a symbol in an export of any batch
    return batch if sources[0].row_lengths is None or not is_known else min(batch, _GROUP)


def attend_chunks(
    dropout_rate: float, queries: Queries, sources: tuple[Any, ...], functions: tuple[ChunkFunctions, ...]
) -> tuple[Array, Array]:
    """(out, natural log-sum-exp) over the tokens of all sources."""
    batch = queries.query.shape[0]
    size = rows_at_once(sources, batch)
    if size == batch:
        return _attend_rows(dropout_rate, queries, sources, functions)

    def of_group(rows: Array) -> tuple[Array, Array]:
        query, b, positions = (x[rows] for x in (queries.query, queries.b, queries.positions))
        of_rows = tuple(source.of_rows(rows) for source in sources)
        return _attend_rows(dropout_rate, Queries(query, b, positions, queries.dropout), of_rows, functions)

    order = jnp.argsort(sources[0].row_lengths)
    groups = jnp.pad(order, (0, -batch % size), mode="edge").reshape(-1, size)
    place = jnp.argsort(order)  # of each row among the sorted rows
    out, lse = (x.reshape(-1, *x.shape[2:])[place] for x in lax.map(of_group, groups))
    return out, lse


def _attend_rows(
    dropout_rate: float, queries: Queries, sources: tuple[Any, ...], functions: tuple[ChunkFunctions, ...]
) -> tuple[Array, Array]:
    batch, heads, seq_q, _ = queries.query.shape
    kv_heads, value_dim = sources[0].value_shape
    axes = varying_axes(queries.query)
    state = softmax.initial_state((batch * kv_heads, heads // kv_heads * seq_q), value_dim, queries.query.dtype)
    state = jax.tree.map(lambda x: vary(x, axes), state)
    for source, of_source in zip(sources, functions, strict=True):
        visit = partial(visit_chunk, source, of_source, queries, dropout_rate)
        state = lax.fori_loop(0, source.num_chunks, visit, state)
    state = without_reverse(
        state,
        "attention to a cache has no reverse-mode derivative: how much of the cache is read depends on what it holds. "
        "Train with memory_efficient_attention, or flash_attention, on arrays.",
    )
    out, lse = softmax.finish(state)
    return out.reshape(batch, heads, seq_q, value_dim), softmax.in_nats(lse.reshape(batch, heads, seq_q))


def visit_chunk(
    source: Source, functions: ChunkFunctions, queries: Queries, dropout_rate: float, n: Any, state: SoftmaxState
) -> SoftmaxState:
    """The state after chunk n; the chunk is not read if the mask forbids all of its tokens."""
    batch, heads, seq_q, _ = queries.query.shape
    chunk = source.chunk(n)
    head_indices = vary(jnp.arange(heads, dtype=jnp.int32), varying_axes(queries.query))
    # (b, h, q, kv) as masks and score mods see them: (B,1,1,1), (1,N,1,1), (B,1,T,1), (B,1,1,S).
    q = queries.positions[:, None, :, None]
    indices = queries.b[:, None, None, None], head_indices[None, :, None, None], q, chunk.position
    keep = chunk.exists
    if functions.mask is not None:  # position -1 is padding, and not the last element of a mask's arrays
        keep = keep & (functions.mask(*indices) & (q >= 0))

    def modify(scores: Array) -> Array:
        assert functions.score_mod is not None
        return jnp.broadcast_to(functions.score_mod(scores, *indices), scores.shape)

    drop = None if queries.dropout is None else dropout_of(queries.dropout, dropout_rate, *indices)

    def update(state: SoftmaxState, *, all_finite: bool) -> SoftmaxState:
        key, value = chunk.read()
        key, value = key.astype(queries.query.dtype), value.astype(queries.query.dtype)
        _, kv_heads, size, _ = key.shape
        if not all_finite:
            key, value, contamination = _replace_non_finite(key, value)
            bias = jnp.broadcast_to(contamination[:, :, None], (batch, kv_heads, heads // kv_heads, size))
            bias = bias.reshape(batch, heads, 1, size)
        # Heads that share keys become rows of one product.
        query, key, value = (x.reshape(batch * kv_heads, -1, x.shape[-1]) for x in (queries.query, key, value))
        scores = softmax.product(query, key, 1, 1).reshape(batch, heads, seq_q, size)
        if all_finite:  # A non-finite score goes around the score mod; an infinite one must not count as masked.
            finite = jnp.isfinite(scores)
            scores, bias = jnp.where(finite, scores, 0), jnp.where(finite, 0, jnp.nan).astype(scores.dtype)
        scores = softmax.mask_scores(scores, keep, bias, None if functions.score_mod is None else modify)
        scores = scores.reshape(batch * kv_heads, -1, size)
        return softmax.update(state, scores, value, dropout=drop)

    def visit(state: SoftmaxState) -> SoftmaxState:
        """First without a test of keys and values: a non-finite one shows in the sums, since 0 * NaN is NaN."""
        after = update(state, all_finite=True)
        finite = jnp.isfinite(after.acc).all() & jnp.isfinite(after.sum).all()
        return lax.cond(finite, lambda: after, lambda: update(state, all_finite=False))

    # Not `visit(state)` even without a mask: XLA would cast a whole bfloat16 pool outside of the loop.
    return lax.cond(keep.any(), visit, lambda state: state, state)


def _replace_non_finite(key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Keys and values with zeros for non-finite ones, and the contamination of their scores: (B, K, S), NaN or 0."""
    finite = is_finite(key) & is_finite(value)
    key, value = (jnp.where(finite[..., None], x, 0) for x in (key, value))
    return key, value, jnp.where(finite, 0, jnp.nan).astype(key.dtype)
