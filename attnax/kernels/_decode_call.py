"""Few queries against many stored tokens, a chunk of tokens at a time: what attention to a cache is made of.

The number of chunks is a value, not a shape: a step's work follows the tokens in use, in the same compiled program. A
`Source` says where its tokens lie and how a chunk of them is read; masks and score mods see true positions. What a
chunk adds to the result is in `_core/softmax.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnax.checks import apply_score_mod
from attnax.kernels._core.dropout import dropout_words
from attnax.kernels._core.finite import scale_query
from attnax.kernels._core.lift import lift
from attnax.kernels._core.mesh import vary, vary_with, varying_axes
from attnax.kernels._core.pairs import check_pairs
from attnax.kernels._core.platform import by_platform
from attnax.kernels._core.stored import Source, Stored
from attnax.kernels._gpu.decode import DeferredCall, KernelCall, decode, kernel_serves, prepare_kernel
from attnax.kernels._xla import decode as xla
from attnax.kernels._xla.decode import Functions, Queries
from attnax.masks import Mask
from attnax.typing import Array, ScoreMod

__all__ = ["attend_chunks"]


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
    queries = Queries(scale_query(query, scale, has_score_mod=score_mod is not None), b, positions, words)
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
    chunks = partial(xla.attend_chunks, dropout_rate)
    if kernel is None:
        return chunks(queries, sources, functions)

    def on_gpu(queries: Queries, sources: Any, functions: Any, kernel: KernelCall | DeferredCall) -> Any:
        bound = kernel.bind() if isinstance(kernel, DeferredCall) else kernel
        serves = bound is not None and kernel_serves(bound)
        return decode(bound) if bound is not None and serves else chunks(queries, sources, functions)

    def elsewhere(queries: Queries, sources: Any, functions: Any, kernel: Any) -> tuple[Array, Array]:
        return chunks(queries, sources, functions)

    return by_platform(elsewhere, queries, sources, functions, kernel, cuda=on_gpu)


def _bind(
    caller: str, queries: Queries, sources: tuple[Source, ...], mask: Mask | None, score_mod: ScoreMod | None
) -> tuple[Any, ...]:
    """The operands of `_attend`, all of which vary over the mesh axes over which any of them does."""
    batch, heads, seq_q, _ = queries.query.shape
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((queries, sources))))
    check_pairs(caller, mask, score_mod, (batch, heads, seq_q, sources[0].chunk_size), axes)

    def functions(axes: frozenset[str]) -> tuple[Functions, ...]:
        return tuple(
            _trace(caller, mask, score_mod, (batch, heads, seq_q, source.chunk_size), queries.query.dtype, axes)
            for source in sources
        )

    return vary_with(functions, queries, sources)


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
