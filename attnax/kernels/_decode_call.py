"""Attention of a few queries to the tokens of a cache: prepared once, and handed to the engine of the platform.

A `Source` holds tokens and reads them in chunks. The number of chunks is a traced value, not a shape: the work of a
step follows the tokens in use, in one compiled program. Masks and score mods see true positions.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.cache import Reading, Source, StoresTokens, TokenArrays, nan_where_lost
from attnax.checks import check_attention
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._core.dropout import rate_of, words_of
from attnax.kernels._core.finite import scale_query
from attnax.kernels._core.lift import defer
from attnax.kernels._core.mesh import vary, vary_all, vary_with, varying_axes
from attnax.kernels._core.operands import lift_bounds, lift_functions
from attnax.kernels._core.platform import by_platform
from attnax.kernels._gpu import decode as gpu_decode
from attnax.kernels._tpu import decode as tpu_decode
from attnax.kernels._xla.decode import ChunkFunctions, Queries, attend_chunks, rows_at_once
from attnax.masks import Mask, as_mask, mask_of_cache, resolve_masks
from attnax.typing import Array, AttentionOptions

__all__ = ["attend_stored", "stored_mask"]


def attend_stored(
    caller: str,
    query: Array,
    cache: StoresTokens,
    positions: Array,
    options: AttentionOptions,
    *,
    rows: tuple[Array, int] | None = None,
    new: StoresTokens | None = None,
) -> tuple[Array, Array]:
    """(out, log-sum-exp) of a few queries over the tokens of a cache, and over new tokens that follow them.

    Args:
        caller: the name in errors.
        query: (B, N, T, H).
        cache: holds B rows.
        positions: (B, T) of the queries.
        options: every option, as the caller gave it.
        rows: (B,), the rows of the batch that masks and score mods see, and the rows of the batch; None for all.
        new: tokens that are not in the cache.
    """
    (batch, num_heads, _, _), num_new = query.shape, 0 if new is None else query.shape[2]
    key, value = (
        jax.ShapeDtypeStruct((batch, x.shape[0], num_new, x.shape[1]), query.dtype if new is None else like.dtype)
        for x, like in zip(cache.key_value, (cache if new is None else new).key_value, strict=True)
    )
    given, checked = options["mask"], options.copy()
    if isinstance(given, jax.Array | np.ndarray):  # its shape must fit the positions, which `stored_mask` checks
        checked["mask"] = np.zeros((), given.dtype)
    check_attention(caller, query, key, value, **checked)
    num_positions = None if cache.num_positions is None else cache.num_positions + num_new
    b, num_rows = (jnp.arange(batch, dtype=jnp.int32), batch) if rows is None else rows
    score_shape = num_rows, num_heads, num_positions, num_positions
    where = f"{caller}, which reads masks and score mods at the positions of cached and new tokens"
    mask = stored_mask(where, cache, given, positions, score_shape)
    mask, score_mod = resolve_masks(where, mask, options["score_mod"], score_shape)
    reading = Reading(mask, b, positions, num_heads)
    sources = tuple(tokens.chunks(reading) for tokens in (cache, new) if tokens is not None)
    call = DecodeCall(
        caller,
        query,
        positions,
        sources,
        {**options, "mask": mask, "score_mod": score_mod},
        b=None if rows is None else b,
        arrays=cache.arrays() if new is None else None,
    )
    out, lse = nan_where_lost(attend_tokens(call), cache)
    return out.astype(query.dtype), lse


def stored_mask(
    caller: str, cache: StoresTokens, mask: Any, positions: Array, score_shape: tuple[int | None, ...]
) -> Mask | None:
    """The mask of a call at the positions of stored tokens, without the pairs whose keys the cache does not keep."""
    if mask is not None:
        mask = mask_of_cache(as_mask(mask), positions, score_shape[3])
        mask.check(caller, score_shape)
    kept = cache.kept
    return mask if kept is None else kept if mask is None else mask & kept


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeCall:
    """A checked call: attention of a few queries to stored tokens."""

    caller: str  # for errors of the score mod
    query: Array  # (B, N, T, H)
    positions: Array  # (B, T) int32, of the queries
    sources: tuple[Source, ...]  # of the tokens
    options: AttentionOptions  # mask and score mod as `resolve_masks` gives them, both of true positions
    b: Array | None = None  # (B,), the rows of the batch that masks and score mods see; None for all in order
    arrays: TokenArrays | None = None  # the same tokens for a kernel; None if no kernel can read them


def attend_tokens(call: DecodeCall) -> tuple[Array, Array]:
    """(out, log-sum-exp), in float32 at least, of the queries over the tokens of all sources."""
    query, options = call.query, call.options
    mask, score_mod, scale = options["mask"], options["score_mod"], options["scale"]
    words = words_of(options)
    b = jnp.arange(query.shape[0], dtype=jnp.int32) if call.b is None else call.b
    queries = Queries(scale_query(query, scale, has_score_mod=score_mod is not None), b, call.positions, words)
    queries, sources, functions = _lift(call, queries)
    kernel = None
    if call.arrays is not None and call.b is None and words is None:
        axes = varying_axes(queries.query)
        scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, jnp.float32)
        bounds = None if mask is None else defer(mask) or lift_bounds(mask)
        is_opaque = mask is not None and mask.is_opaque
        kernel = DecodeInputs(query, scale, call.positions, call.arrays, bounds, is_opaque)
        kernel = vary_all(kernel, axes)
    return _attend(queries, sources, functions, kernel, dropout_rate=rate_of(options))


@partial(jax.jit, static_argnames="dropout_rate")  # so that a call outside of jit compiles once
def _attend(
    queries: Queries,
    sources: tuple[Any, ...],
    functions: tuple[ChunkFunctions, ...],
    kernel: DecodeInputs | None,
    *,
    dropout_rate: float,
) -> tuple[Array, Array]:
    in_chunks = partial(attend_chunks, dropout_rate)
    if kernel is None:
        return in_chunks(queries, sources, functions)

    def on(engine: Any) -> Any:
        def run(queries: Queries, sources: Any, functions: Any, kernel: DecodeInputs) -> Any:
            found = engine.attend(kernel, functions[0].mask, functions[0].score_mod)
            return found or in_chunks(queries, sources, functions)

        return run

    def elsewhere(queries: Queries, sources: Any, functions: Any, kernel: Any) -> tuple[Array, Array]:
        return in_chunks(queries, sources, functions)

    return by_platform(elsewhere, queries, sources, functions, kernel, cuda=on(gpu_decode), tpu=on(tpu_decode))


def _lift(call: DecodeCall, queries: Queries) -> tuple[Queries, tuple[Source, ...], tuple[ChunkFunctions, ...]]:
    """Queries, sources and functions, all marked as varying over the union of their mesh axes."""
    mask, score_mod, dtype = call.options["mask"], call.options["score_mod"], queries.query.dtype
    batch, heads, seq_q, _ = queries.query.shape
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((queries, call.sources))))
    score_shape = batch, heads, seq_q, call.sources[0].chunk_size
    functions = lift_functions(call.caller, mask, score_mod, score_shape, axes, dtype)

    def of_sources(axes: frozenset[str]) -> tuple[ChunkFunctions, ...]:
        def example(*shape: int, dtype: Any = jnp.int32) -> Any:
            return vary(jnp.zeros(shape, dtype), axes) if axes else jax.ShapeDtypeStruct(shape, dtype)

        rows = rows_at_once(call.sources, batch)
        b, h, q = example(rows, 1, 1, 1), example(1, heads, 1, 1), example(rows, 1, seq_q, 1)
        sizes = (source.chunk_size for source in call.sources)
        return tuple(
            ChunkFunctions(*functions(example(rows, heads, seq_q, n, dtype=dtype), b, h, q, example(rows, 1, 1, n)))
            for n in sizes
        )

    queries, sources, lifted = vary_with(of_sources, queries, call.sources)
    return queries, sources, lifted
