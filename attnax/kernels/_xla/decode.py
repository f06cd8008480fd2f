"""Few queries against many stored tokens, a chunk of tokens at a time: what attention to a cache is made of.

The number of chunks is a value, not a shape: a step's work follows the tokens in use, in the same compiled program. A
`Source` says where its tokens lie and how a chunk of them is read; masks and score mods see true positions. What a
chunk adds to the result is in `_core/softmax.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.no_reverse import without_reverse
from attnax.kernels._core.stored import Chunk
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array

__all__ = ["Functions", "Queries", "attend_chunks"]


@pytree_dataclass
class Queries:
    """The queries of B rows and how masks and score mods see them."""

    query: Array  # (B, N, T, H), scaled
    rows: Array  # (B,), the b that masks and score mods see
    positions: Array  # (B, T); a negative one is no token and attends nothing
    dropout: Array | None  # two words


@pytree_dataclass
class Functions:
    """The mask and the score mod, traced at the shape of a source's chunk."""

    mask: Lifted | None  # (b, h, q, kv) -> keep
    score_mod: Lifted | None  # (scores, b, h, q, kv) -> scores


def attend_chunks(
    dropout_rate: float, queries: Queries, sources: tuple[Any, ...], functions: tuple[Functions, ...]
) -> tuple[Array, Array]:
    batch, heads, seq_q, _ = queries.query.shape
    kv_heads, value_dim = sources[0].value_shape
    axes = varying_axes(queries.query)
    state = softmax.initial_state((batch * kv_heads, heads // kv_heads * seq_q), value_dim, queries.query.dtype)
    state = jax.tree.map(lambda x: vary(x, axes), state)
    for source, of_source in zip(sources, functions, strict=True):

        def visit(
            n: Any, state: softmax.SoftmaxState, source: Any = source, of_source: Functions = of_source
        ) -> softmax.SoftmaxState:
            return visit_chunk(state, source.chunk(n), of_source, queries, dropout_rate)

        state = lax.fori_loop(0, source.num_chunks, visit, state)
    state = without_reverse(
        state,
        "attention to a cache has no reverse-mode derivative: how much of the cache is read depends on what it holds. "
        "Train with memory_efficient_attention, or flash_attention, on arrays.",
    )
    out, lse = softmax.finish(state)
    return out.reshape(batch, heads, seq_q, value_dim), softmax.natural(lse.reshape(batch, heads, seq_q))


def visit_chunk(
    state: softmax.SoftmaxState, chunk: Chunk, functions: Functions, queries: Queries, dropout_rate: float
) -> softmax.SoftmaxState:
    """The state after one more chunk, which is not read where the mask forbids all of it."""
    batch, heads, seq_q, _ = queries.query.shape
    indices = _indices(queries, chunk)
    keep = chunk.exists if functions.mask is None else chunk.exists & functions.mask(*indices)

    def modify(scores: Array) -> Array:
        assert functions.score_mod is not None
        return functions.score_mod(scores, *indices)

    drop = None if queries.dropout is None else dropout_of(queries.dropout, dropout_rate, *indices)

    def update(state: softmax.SoftmaxState, *, careful: bool) -> softmax.SoftmaxState:
        key, value = chunk.read()
        key, value = key.astype(queries.query.dtype), value.astype(queries.query.dtype)
        _, kv_heads, size, _ = key.shape
        if careful:
            key, value, spoiled = _clean(key, value)
            bias = jnp.broadcast_to(spoiled[:, :, None], (batch, kv_heads, heads // kv_heads, size))
            bias = bias.reshape(batch, heads, 1, size)
        # Heads that share keys become rows of one product.
        query, key, value = (x.reshape(batch * kv_heads, -1, x.shape[-1]) for x in (queries.query, key, value))
        scores = softmax.product(query, key, 1, 1).reshape(batch, heads, seq_q, size)
        if not careful:  # what spoils a key must get past the score mod, and infinity not pass for a masked one
            spoiled = ~jnp.isfinite(scores)
            scores, bias = jnp.where(spoiled, 0, scores), jnp.where(spoiled, jnp.nan, 0).astype(scores.dtype)
        scores = softmax.mask_scores(scores, keep, bias, None if functions.score_mod is None else modify)
        scores = scores.reshape(batch * kv_heads, -1, size)
        return softmax.update(state, scores, value, dropout=drop)

    def quick(state: softmax.SoftmaxState) -> softmax.SoftmaxState:
        """Keys and values as they are; if something in them is not finite, the sums show it: 0 * NaN is NaN."""
        after = update(state, careful=False)
        fine = jnp.isfinite(after.acc).all() & jnp.isfinite(after.sum).all()
        return lax.cond(fine, lambda: after, lambda: update(state, careful=True))

    # Not `quick(state)` even without a mask: XLA would cast a whole bfloat16 pool outside of the loop.
    return lax.cond(keep.any(), quick, lambda state: state, state)


def _indices(queries: Queries, chunk: Chunk) -> tuple[Array, Array, Array, Array]:
    """(b, h, q, kv) of the chunk as masks and score mods see them: (B,1,1,1), (1,N,1,1), (B,1,T,1), (B,1,1,S)."""
    heads = vary(jnp.arange(queries.query.shape[1], dtype=jnp.int32), varying_axes(queries.query))
    q = queries.positions[:, None, :, None]
    return queries.rows[:, None, None, None], heads[None, :, None, None], q, chunk.position


def _clean(key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Keys and values with 0 for one that is not finite, and (B, K, S) NaN to spoil the scores of who attends it."""
    fine = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    key, value = (jnp.where(fine[..., None], x, 0) for x in (key, value))
    return key, value, jnp.where(fine, 0, jnp.nan).astype(key.dtype)
