"""Few queries against many stored tokens, a chunk of tokens at a time: what attention to a cache is made of.

The number of chunks is a value, not a shape: a step's work follows the tokens in use, in the same compiled program. A
`Source` says where its tokens lie and how a chunk of them is read; masks and score mods see true positions. What a
chunk adds to the result is in `_tile.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from attnax.kernels import _tile
from attnax.kernels._blockwise import scale_query
from attnax.kernels._decode import DeferredCall, KernelCall, Stored, decode, kernel_serves, prepare_kernel
from attnax.kernels._dropout import dropout_words, keep_weights
from attnax.kernels._lift import Lifted, lift, vary, varying_axes
from attnax.kernels._no_reverse import without_reverse
from attnax.kernels._pairs import check_pairs
from attnax.kernels._platform import by_platform
from attnax.masks import Mask
from attnax.typing import Array, ScoreMod, apply_score_mod, pytree_dataclass

__all__ = ["Chunk", "Source", "attend_chunks"]


class Chunk(NamedTuple):
    """Some tokens of every row."""

    position: Array  # (B, 1, 1, S)
    exists: Array  # (B, 1, 1, S): slots without a token are masked, whatever they hold
    read: Callable[[], tuple[Array, Array]]  # () -> (B, K, S, H), (B, K, S, V)


@runtime_checkable
class Source(Protocol):
    """Stored tokens of B rows, a pytree."""

    @property
    def num_chunks(self) -> Array:
        """How many chunks to read.

        Loops of known length could be differentiated in reverse, but not with the care that NaN needs.
        """

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """(K, V)."""

    def chunk(self, n: Array) -> Chunk:
        """The chunk to be read as number n."""


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
    caller: str,
    query: Array,
    scale: Any,
    sources: tuple[Source, ...],
    positions: Array,
    *,
    rows: Array | None,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    dropout_rng: Array | None,
    dropout_rate: float,
    stored: Stored | None = None,
) -> tuple[Array, Array]:
    """(out, log-sum-exp), in float32 at least, of the queries over the tokens of all sources.

    Args:
        caller: for errors of the score mod.
        query: (B, N, T, H).
        scale: of the scores, None for H ** -0.5.
        sources: what holds the tokens.
        positions: (B, T) int32, of the queries.
        rows: (B,), the b that masks and score mods see; None for all in order.
        mask: of true positions.
        score_mod: of true positions.
        dropout_rng: key of the dropout.
        dropout_rate: 0 for none.
        stored: the same tokens as arrays, where a GPU may read those.
    """
    words = dropout_words(dropout_rng) if dropout_rate > 0.0 and dropout_rng is not None else None
    b = jnp.arange(query.shape[0], dtype=jnp.int32) if rows is None else rows
    queries = Queries(scale_query(query, scale, natural=score_mod is not None), b, positions, words)
    operands = _bind(caller, queries, sources, mask, score_mod)
    kernel = None
    if stored is not None and rows is None and words is None:
        axes = varying_axes(operands[0].query)
        scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, jnp.float32)
        kernel = prepare_kernel(caller, query, scale, stored, positions, mask, score_mod, axes)
    return _attend(*operands, kernel, dropout_rate=dropout_rate)


@partial(jax.jit, static_argnames="dropout_rate")  # so that a call outside of jit compiles once
def _attend(
    queries: Queries,
    sources: tuple[Any, ...],
    functions: tuple[Functions, ...],
    kernel: KernelCall | DeferredCall | None,
    *,
    dropout_rate: float,
) -> tuple[Array, Array]:
    chunks = partial(_attend_chunks, dropout_rate)
    if kernel is None:
        return chunks(queries, sources, functions)

    def on_gpu(queries: Queries, sources: Any, functions: Any, kernel: KernelCall | DeferredCall) -> Any:
        bound = kernel.bind() if isinstance(kernel, DeferredCall) else kernel
        serves = bound is not None and kernel_serves(bound)
        return decode(bound) if bound is not None and serves else chunks(queries, sources, functions)

    def elsewhere(queries: Queries, sources: Any, functions: Any, kernel: Any) -> tuple[Array, Array]:
        return chunks(queries, sources, functions)

    return by_platform(elsewhere, queries, sources, functions, kernel, cuda=on_gpu)


def _attend_chunks(
    dropout_rate: float, queries: Queries, sources: tuple[Any, ...], functions: tuple[Functions, ...]
) -> tuple[Array, Array]:
    batch, heads, seq_q, _ = queries.query.shape
    kv_heads, value_dim = sources[0].value_shape
    axes = varying_axes(queries.query)
    state = _tile.initial_state((batch * kv_heads, heads // kv_heads * seq_q), value_dim, queries.query.dtype)
    state = jax.tree.map(lambda x: vary(x, axes), state)
    for source, of_source in zip(sources, functions, strict=True):

        def visit(
            n: Any, state: _tile.SoftmaxState, source: Any = source, of_source: Functions = of_source
        ) -> _tile.SoftmaxState:
            return _visit(state, source.chunk(n), of_source, queries, dropout_rate)

        state = lax.fori_loop(0, source.num_chunks, visit, state)
    state = without_reverse(
        state,
        "attention to a cache has no reverse-mode derivative: how much of the cache is read depends on what it holds. "
        "Train with memory_efficient_attention, or flash_attention, on arrays.",
    )
    out, lse = _tile.finish(state)
    return out.reshape(batch, heads, seq_q, value_dim), lse.reshape(batch, heads, seq_q) / _tile.LOG2E


def _visit(
    state: _tile.SoftmaxState, chunk: Chunk, functions: Functions, queries: Queries, dropout_rate: float
) -> _tile.SoftmaxState:
    """The state after one more chunk, which is not read where the mask forbids all of it."""
    batch, heads, seq_q, _ = queries.query.shape
    indices = _indices(queries, chunk)
    keep = chunk.exists if functions.mask is None else chunk.exists & functions.mask(*indices)

    def modify(scores: Array) -> Array:
        assert functions.score_mod is not None
        return functions.score_mod(scores, *indices)

    def drop(weights: Array) -> Array:
        assert queries.dropout is not None
        kept = keep_weights(queries.dropout, dropout_rate, *indices)
        return jnp.where(kept.reshape(weights.shape), weights / (1.0 - dropout_rate), 0)

    def update(state: _tile.SoftmaxState, *, careful: bool) -> _tile.SoftmaxState:
        key, value = chunk.read()
        key, value = key.astype(queries.query.dtype), value.astype(queries.query.dtype)
        _, kv_heads, size, _ = key.shape
        if careful:
            key, value, spoiled = _clean(key, value)
            bias = jnp.broadcast_to(spoiled[:, :, None], (batch, kv_heads, heads // kv_heads, size))
            bias = bias.reshape(batch, heads, 1, size)
        # Heads that share keys become rows of one product.
        query, key, value = (x.reshape(batch * kv_heads, -1, x.shape[-1]) for x in (queries.query, key, value))
        scores = _tile.product(query, key, 1, 1).reshape(batch, heads, seq_q, size)
        if not careful:  # what spoils a key must get past the score mod, and infinity not pass for a masked one
            spoiled = ~jnp.isfinite(scores)
            scores, bias = jnp.where(spoiled, 0, scores), jnp.where(spoiled, jnp.nan, 0).astype(scores.dtype)
        scores = _tile.mask_scores(scores, keep, bias, None if functions.score_mod is None else modify)
        scores = scores.reshape(batch * kv_heads, -1, size)
        return _tile.update(state, scores, value, dropout=None if queries.dropout is None else drop)

    def quick(state: _tile.SoftmaxState) -> _tile.SoftmaxState:
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


def _bind(
    caller: str, queries: Queries, sources: tuple[Source, ...], mask: Mask | None, score_mod: ScoreMod | None
) -> tuple[Any, ...]:
    """The operands of `_attend`, all of which vary over the mesh axes over which any of them does."""
    batch, heads, seq_q, _ = queries.query.shape
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((queries, sources))))
    check_pairs(caller, mask, score_mod, (batch, heads, seq_q, sources[0].chunk_size), axes)
    known = None
    while axes != known:  # what the functions capture may vary over more axes than the arguments do
        known = axes
        functions = tuple(
            _trace(caller, mask, score_mod, (batch, heads, seq_q, source.chunk_size), queries.query.dtype, axes)
            for source in sources
        )
        axes = axes.union(*map(varying_axes, jax.tree.leaves(functions)))
    return jax.tree.map(lambda x: vary(x, axes), (queries, sources, functions))


def _trace(
    caller: str,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    full: tuple[int, int, int, int],
    dtype: Any,
    axes: frozenset[str],
) -> Functions:
    """The user's functions at the shape of a chunk, with the arrays that they capture as operands."""
    batch, heads, seq_q, size = full

    def example(*shape: int, dtype: Any = jnp.int32) -> Any:
        return vary(jnp.zeros(shape, dtype), axes) if axes else jax.ShapeDtypeStruct(shape, dtype)

    def keep(b: Array, h: Array, q: Array, kv: Array) -> Array:
        assert mask is not None
        allowed = mask(b, h, q, kv)
        # Position -1 is not the last one of a mask's arrays.
        return allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape) & (q >= 0)

    def modify(scores: Array, *indices: Array) -> Array:
        assert score_mod is not None
        return apply_score_mod(caller, score_mod, scores, *indices)

    indices = example(batch, 1, 1, 1), example(1, heads, 1, 1), example(batch, 1, seq_q, 1), example(batch, 1, 1, size)
    return Functions(
        None if mask is None else lift(keep, *indices),
        None if score_mod is None else lift(modify, example(*full, dtype=dtype), *indices),
    )
