"""Attention of a few queries to the tokens of a cache: prepared once, and handed to the engine of the platform.

A `Source` says where its tokens lie and how a chunk of them is read. How many chunks are read is a traced value, not a
shape: a step's work follows the tokens in use, in one compiled program. Masks and score mods see true positions.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnax.checks import apply_score_mod
from attnax.kernels._core.dropout import dropout_words
from attnax.kernels._core.finite import scale_query
from attnax.kernels._core.lift import lift
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.pairs import check_pairs
from attnax.kernels._core.platform import by_platform
from attnax.kernels._core.stored import Source, TokenArrays
from attnax.kernels._gpu.decode import (
    BoundKernel,
    DecodeInputs,
    DeferredKernel,
    attend_bound,
    kernel_serves,
    prepare_kernel,
)
from attnax.kernels._xla.decode import ChunkFunctions, Queries, attend_chunks
from attnax.typing import Array, AttentionOptions

__all__ = ["DecodeCall", "attend_tokens"]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeCall:
    """Attention of a few queries to stored tokens, checked."""

    caller: str  # for errors of the score mod
    query: Array  # (B, N, T, H)
    positions: Array  # (B, T) int32, of the queries
    sources: tuple[Source, ...]  # of the tokens
    options: AttentionOptions  # mask and score mod as `resolve_masks` gives them, both of true positions
    b: Array | None = None  # (B,), the rows of the batch that masks and score mods see; None for all in order
    arrays: TokenArrays | None = None  # the same tokens for a GPU kernel; None where it cannot read them


def attend_tokens(call: DecodeCall) -> tuple[Array, Array]:
    """(out, log-sum-exp), in float32 at least, of the queries over the tokens of all sources."""
    query, options = call.query, call.options
    mask, score_mod, scale = options["mask"], options["score_mod"], options["scale"]
    rate, rng = 0.0 if options["deterministic"] else options["dropout_rate"], options["dropout_rng"]
    words = dropout_words(rng) if rate > 0.0 and rng is not None else None
    b = jnp.arange(query.shape[0], dtype=jnp.int32) if call.b is None else call.b
    queries = Queries(scale_query(query, scale, natural=score_mod is not None), b, call.positions, words)
    operands = _bind(call, queries)
    kernel = None
    if call.arrays is not None and call.b is None and words is None:
        axes = varying_axes(operands[0].query)
        scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, jnp.float32)
        inputs = DecodeInputs(query, scale, call.positions, call.arrays, call.caller)
        kernel = prepare_kernel(jax.tree.map(lambda x: vary(x, axes), inputs), mask, score_mod)
    return _attend(*operands, kernel, dropout_rate=rate)


@partial(jax.jit, static_argnames="dropout_rate")  # so that a call outside of jit compiles once
def _attend(
    queries: Queries,
    sources: tuple[Any, ...],
    functions: tuple[ChunkFunctions, ...],
    kernel: BoundKernel | DeferredKernel | None,
    *,
    dropout_rate: float,
) -> tuple[Array, Array]:
    in_chunks = partial(attend_chunks, dropout_rate)
    if kernel is None:
        return in_chunks(queries, sources, functions)

    def on_gpu(queries: Queries, sources: Any, functions: Any, kernel: BoundKernel | DeferredKernel) -> Any:
        bound = kernel.bind() if isinstance(kernel, DeferredKernel) else kernel
        if bound is None or not kernel_serves(bound):
            return in_chunks(queries, sources, functions)
        return attend_bound(bound)

    def elsewhere(queries: Queries, sources: Any, functions: Any, kernel: Any) -> tuple[Array, Array]:
        return in_chunks(queries, sources, functions)

    return by_platform(elsewhere, queries, sources, functions, kernel, cuda=on_gpu)


def _bind(call: DecodeCall, queries: Queries) -> tuple[Any, ...]:
    """The operands of `_attend`, all of which vary over the mesh axes over which any of them does."""
    batch, heads, seq_q, _ = queries.query.shape
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((queries, call.sources))))
    shapes = [(batch, heads, seq_q, source.chunk_size) for source in call.sources]
    check_pairs(call.caller, call.options["mask"], call.options["score_mod"], shapes[0], axes)
    known = None
    while axes != known:  # captured arrays may vary over more axes than the arguments do
        known = axes
        functions = tuple(_trace(call, shape, queries.query.dtype, axes) for shape in shapes)
        axes = axes.union(*map(varying_axes, jax.tree.leaves(functions)))
    return jax.tree.map(lambda x: vary(x, axes), (queries, call.sources, functions))


def _trace(call: DecodeCall, score_shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> ChunkFunctions:
    """The user's functions at the shape of a chunk, with the arrays that they capture as operands."""
    mask, score_mod = call.options["mask"], call.options["score_mod"]
    batch, heads, seq_q, size = score_shape

    def example(*shape: int, dtype: Any = jnp.int32) -> Any:
        return vary(jnp.zeros(shape, dtype), axes) if axes else jax.ShapeDtypeStruct(shape, dtype)

    def keep(b: Array, h: Array, q: Array, kv: Array) -> Array:
        allowed = mask(b, h, q, kv)
        # Position -1 is not the last one of a mask's arrays.
        return allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape) & (q >= 0)

    def modify(scores: Array, *indices: Array) -> Array:
        assert score_mod is not None
        return apply_score_mod(call.caller, score_mod, scores, *indices)

    indices = example(batch, 1, 1, 1), example(1, heads, 1, 1), example(batch, 1, seq_q, 1), example(batch, 1, 1, size)
    return ChunkFunctions(
        None if mask is None else lift(keep, *indices),
        None if score_mod is None else lift(modify, example(*score_shape, dtype=dtype), *indices),
    )
