"""Linear attention: without a softmax, a state of fixed size stands for all earlier keys."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import LinearState
from attnax.checks import check_attention, wide_dtype
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.key_padding import split_mask
from attnax.masks import Mask, takes_mask_objects
from attnax.typing import Array, ArrayLike, AttentionFnOptions, Float, MaskMod, ScoreMod, Shaped

__all__ = ["linear_attention"]

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class LinearOptions(AttentionFnOptions, total=False):
    """The keywords of `linear_attention`, except `return_state`."""

    causal: bool
    chunk_size: int
    state: LinearState | None


class _Out(LinearOptions, total=False):
    return_state: Literal[False]


class _OutAndState(LinearOptions):
    return_state: Literal[True]


@overload
def linear_attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_Out]) -> Array: ...
@overload
def linear_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_OutAndState]
) -> tuple[Array, LinearState]: ...
@takes_mask_objects
def linear_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    causal: bool = True,
    chunk_size: int = 64,
    state: LinearState | None = None,
    return_state: bool = False,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], LinearState]:
    """phi(query) (phi(key)^T value) / (phi(query) . sum of phi(key)), phi(x) = elu(x) + 1, over the allowed keys.

    Causal attention works in chunks: dense within a chunk, through the state for earlier keys. Time and memory
    are linear in the length. A gradient also keeps one state for each chunk; a chunk_size of about value_dim balances
    both.

    Args:
        query: (batch, num_heads, seq_q, head_dim), any floating dtype.
        key: (batch, num_kv_heads, seq_kv, head_dim); num_heads is a multiple of num_kv_heads.
        value: (batch, num_kv_heads, seq_kv, value_dim).
        mask: None, `masks.causal()`, key padding (`masks.padding(...)`, or a boolean array that broadcasts to
            (batch, 1, 1, seq_kv), True to attend), or `masks.causal() & padding`. A query with nothing to attend
            gives exactly 0.
        score_mod: must be None: there are no scores.
        dropout_rng: not used: there are no weights to drop.
        dropout_rate: must be 0 unless `deterministic`.
        deterministic: no dropout.
        causal: query i attends the keys 0 to i, by index also when seq_q != seq_kv. A mask with a causal part makes
            attention causal in any case.
        chunk_size: length of a chunk. Changes rounding only.
        state: of the previous call, whose keys come before all keys of this call. Causal only.
        return_state: also return the state after all keys. Causal only.

    Returns:
        (batch, num_heads, seq_q, value_dim) in the dtype of query, and with `return_state` the LinearState.
        Features, products and sums are in float32 (float64 for float64). A NaN or infinity in a key or value makes
        the queries that may attend it NaN; all other queries, and their gradients, stay the same.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: a score_mod, dropout, or any other mask.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.linear import linear_attention
        >>> x = jnp.ones((1, 4, 5, 8))
        >>> start, state = linear_attention(x[:, :, :3], x[:, :2, :3], x[:, :2, :3], return_state=True)
        >>> linear_attention(x[:, :, 3:], x[:, :2, 3:], x[:, :2, 3:], state=state).shape
        (1, 4, 2, 8)

    References:
        A. Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020, https://arxiv.org/abs/2006.16236.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    options: AttentionFnOptions = {"mask": mask, "score_mod": score_mod}
    options |= {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate, "deterministic": deterministic}
    check_attention("linear_attention", query, key, value, **options)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"linear_attention: chunk_size must be a whole number of at least 1; got chunk_size={chunk_size}."
        )
    if score_mod is not None:
        raise NotImplementedError(
            f"linear_attention: there are no scores to modify; got score_mod={score_mod!r}. Use a softmax kernel."
        )
    if dropout_rate > 0.0 and not deterministic:
        raise NotImplementedError(
            f"linear_attention: there are no attention weights to drop; got dropout_rate={dropout_rate}, "
            "deterministic=False. Pass dropout_rate=0.0 or use a softmax kernel."
        )
    batch, num_heads, seq_q, head_dim = query.shape
    num_kv_heads, seq_kv, value_dim = value.shape[1:]
    causal_mask, real = split_mask("linear_attention", mask, (batch, num_heads, seq_q, seq_kv))
    causal = causal or causal_mask
    if not causal and (state is not None or return_state):
        raise ValueError(
            "linear_attention: only causal attention has a state to continue from; got causal=False with "
            f"{'return_state=True' if state is None else 'a state'}. Pass causal=True or all keys in one call."
        )
    if state is not None:
        _check_state(state, batch, num_kv_heads, head_dim, value_dim, wide_dtype(query.dtype))

    # Heads that share keys have an axis of their own.
    query = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, seq_q, head_dim)
    if causal:
        if not return_state:  # no query attends the keys after the last query
            key, value, real = key[:, :, :seq_q], value[:, :, :seq_q], real[:, :seq_q]
        out, new_state = _attend_chunks(state, query, key, value, real, chunk_size)
    else:
        features, finite = _query_features(query)
        new_state = _add_keys(None, *_key_features(key, value, real))
        out = _finish(*_read_state(new_state, features), finite, query.dtype)
    out = out.reshape(batch, num_heads, seq_q, value_dim)
    return (out, new_state) if return_state else out


def _check_state(state: LinearState, batch: int, heads: int, head_dim: int, value_dim: int, dtype: Any) -> None:
    have = [(x.shape, x.dtype) for x in (state.key_value_sum, state.key_sum)]
    want = [((batch, heads, head_dim, value_dim), dtype), ((batch, heads, head_dim), dtype)]
    if have != want:
        raise ValueError(
            "linear_attention: state must hold key_value_sum and key_sum of shapes "
            f"{want[0][0]} and {want[1][0]}, {dtype}; got {have[0][0]}, {have[0][1]} and {have[1][0]}, {have[1][1]}. "
            "Pass the state that the previous call returned."
        )


def _attend_chunks(
    state: LinearState | None, query: Array, key: Array, value: Array, real: Array, chunk_size: int
) -> tuple[Array, LinearState]:
    """Causal attention of query (B, K, G, T, H), and the state after all keys."""
    length = max(query.shape[3], key.shape[2])
    size = max(1, min(chunk_size, length))
    count = -(-length // size)
    chunk = partial(_to_chunks, size=size, count=count)
    chunks = chunk(query, 3), chunk(key, 2), chunk(value, 2), chunk(real, 1)
    # A sum over no keys, not zeros: under shard_map it varies over the same axes as the later sums.
    start = _add_keys(state, *_key_features(key[:, :, :0], value[:, :, :0], real[:, :0]))
    new_state, out = lax.scan(jax.checkpoint(_attend_chunk, prevent_cse=False), start, chunks)
    out = jnp.moveaxis(out, 0, 3)
    out = out.reshape(*out.shape[:3], count * size, out.shape[-1])
    return out[:, :, :, : query.shape[3]], new_state


def _to_chunks(x: Array, axis: int, size: int, count: int) -> Array:
    """Pads `axis` to `count` chunks of `size` with zeros and moves the chunks to the front."""
    x = jnp.pad(x, [(0, size * count - n if i == axis else 0) for i, n in enumerate(x.shape)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _attend_chunk(state: LinearState, chunk: tuple[Array, Array, Array, Array]) -> tuple[LinearState, Array]:
    """One chunk: dense attention to its own keys, and the state for all earlier keys."""
    query, key, value, real = chunk
    features, finite = _query_features(query)
    key_features, finite_value, non_finite = _key_features(key, value, real)
    weights = _einsum("BKGTH,BKSH->BKGTS", features, key_features)
    weights = jnp.where(jnp.tri(query.shape[3], dtype=bool)[None, None, None], weights, 0)
    numerator, denominator, contaminated = _read_state(state, features)
    numerator = numerator + _einsum("BKGTS,BKSV->BKGTV", weights, finite_value)
    denominator = denominator + weights.sum(-1)
    contaminated = contaminated | (jnp.cumsum(non_finite, axis=-1) > 0)[:, :, None]
    out = _finish(numerator, denominator, contaminated, finite, query.dtype)
    return _add_keys(state, key_features, finite_value, non_finite), out


def _phi(x: Array) -> Array:
    """elu(x) + 1, without the cancellation of expm1(x) + 1 far below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _query_features(query: Array) -> tuple[Array, Array]:
    """The phi of each query up to a factor, and True for each finite query."""
    finite = is_finite(query)
    query = jnp.where(finite[..., None], query.astype(wide_dtype(query.dtype)), 0)
    # Below 0 phi is exp, so a shift is a factor that the division cancels. With the shift no query underflows.
    peak = lax.stop_gradient(query.max(-1, keepdims=True))
    return _phi(query - jnp.minimum(peak, 0)), finite


def _key_features(key: Array, value: Array, real: Array) -> tuple[Array, Array, Array]:
    """phi(key) and value, both 0 for padding and non-finite keys, and True for real, non-finite keys (B, K, S)."""
    dtype = wide_dtype(key.dtype)
    finite = is_finite(key) & is_finite(value)
    real = real[:, None]
    counts = (finite & real)[..., None]
    features = jnp.where(counts, _phi(jnp.where(counts, key.astype(dtype), 0)), 0)
    return features, jnp.where(counts, value.astype(dtype), 0), real & ~finite


def _add_keys(state: LinearState | None, features: Array, value: Array, non_finite: Array) -> LinearState:
    key_value_sum = _einsum("BKSH,BKSV->BKHV", features, value)
    key_sum = jnp.where(non_finite.any(-1)[..., None], jnp.nan, features.sum(-2))
    if state is None:
        return LinearState(key_value_sum, key_sum)
    return LinearState(state.key_value_sum + key_value_sum, state.key_sum + key_sum)


def _read_state(state: LinearState, features: Array) -> tuple[Array, Array, Array]:
    """Numerator, denominator, and True for each head that a non-finite key has contaminated."""
    finite = is_finite(state.key_sum)
    key_sum = jnp.where(finite[..., None], state.key_sum, 0)
    numerator = _einsum("BKGTH,BKHV->BKGTV", features, state.key_value_sum)
    denominator = _einsum("BKGTH,BKH->BKGT", features, key_sum)
    return numerator, denominator, ~finite[:, :, None, None]


def _finish(numerator: Array, denominator: Array, contaminated: Array, finite: Array, dtype: Any) -> Array:
    """The quotient: 0 where nothing is attended, NaN in a contaminated row and for a non-finite query."""
    attended = denominator >= jnp.finfo(denominator.dtype).tiny
    contaminated = contaminated | (attended & ~finite)
    contaminated = contaminated | ~is_finite(numerator) | ~jnp.isfinite(denominator)
    divides = attended & ~contaminated
    # The derivative of a quotient holds 1 / denominator^2, which overflows below 1e-19, so it is scaled to 1 first.
    denominator = jnp.where(divides, denominator, 1)
    scale = lax.stop_gradient(1 / denominator)
    out = (jnp.where(divides[..., None], numerator, 0) * scale[..., None]) / (denominator * scale)[..., None]
    return jnp.where(contaminated[..., None], jnp.nan, out).astype(dtype)
