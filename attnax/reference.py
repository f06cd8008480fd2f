"""Multi-head attention, from the first projection to the last, as pure functions to be read top to bottom.

The letters of the shapes: `*L` any leading axes (batch, ...), T query tokens, S key tokens, N heads, D the width
of a token, k the width of a query or a key, v the width of a value.

    head_i = activation(Q W_i^Q (K W_i^K)^T / sqrt(k)) V W_i^V        MultiHead = concat(head_1 ... head_N) W^O

This file is one of the two definitions that tests compare the kernels with. The code is slow, and no other file of
Attnax calls it. References: A. Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnax.typing import Array, Bool, Float

Activation = Callable[[Array], Array]
"""Maps salience to weights along the last axis, the keys; softmax in the paper."""


class AttentionParams(NamedTuple):
    """The four matrices of multi-head attention; token widths may differ between queries, keys and values."""

    query: Float[Array, "Dq N k"]
    key: Float[Array, "Dk N k"]
    value: Float[Array, "Dv N v"]
    out: Float[Array, "N v D"]


def project(tokens: Float[Array, "*L T D"], weight: Float[Array, "D N k"]) -> Float[Array, "*L T N k"]:
    """Projects each token by the matrix of each head."""
    _expect(tokens.shape[-1] == weight.shape[0], "project", "tokens and weight must agree in width", tokens, weight)
    return jnp.einsum("...TD,DNk->...TNk", tokens, weight, precision=lax.Precision.HIGHEST)


def split_heads(projected: Float[Array, "*L T N k"]) -> Float[Array, "*L N T k"]:
    """Moves heads to the leading axes: heads are independent of each other."""
    return jnp.swapaxes(projected, -3, -2)


def salience(query: Float[Array, "*L T k"], key: Float[Array, "*L S k"]) -> Float[Array, "*L T S"]:
    """The dot product of each query and key, scaled so that its variance does not grow with k."""
    _expect(query.shape[-1] == key.shape[-1], "salience", "query and key must agree in width", query, key)
    scores = jnp.einsum("...Tk,...Sk->...TS", query, key, precision=lax.Precision.HIGHEST)
    return scores / jnp.sqrt(jnp.asarray(query.shape[-1], scores.dtype))


def weigh(weights: Float[Array, "*L T S"], value: Float[Array, "*L S v"]) -> Float[Array, "*L T v"]:
    """For each query the weighted sum of the values; the weights run over the keys, the last axis."""
    _expect(weights.shape[-1] == value.shape[-2], "weigh", "there must be one weight a value", weights, value)
    return jnp.einsum("...TS,...Sv->...Tv", weights, value, precision=lax.Precision.HIGHEST)


def attention(
    query: Float[Array, "*L T k"],
    key: Float[Array, "*L S k"],
    value: Float[Array, "*L S v"],
    mask: Bool[Array, "*#L #T #S"] | None = None,
    activation: Activation = jax.nn.softmax,
) -> Float[Array, "*L T v"]:
    """activation(Q K^T / sqrt(k)) V; where `mask` is False the salience is -inf, which softmax turns to 0."""
    scores = salience(query, key)
    if mask is not None:
        sizes = zip(mask.shape[::-1], scores.shape[::-1], strict=False)
        fits = mask.dtype == jnp.bool_ and all(have in (1, want) for have, want in sizes)
        rule = f"mask must be boolean, not {mask.dtype}, and broadcast to the salience"
        _expect(fits, "attention", rule, mask, scores)
        scores = jnp.where(mask, scores, -jnp.inf)
    return weigh(activation(scores), value)


def merge_heads(heads: Float[Array, "*L N T v"], weight: Float[Array, "N v D"]) -> Float[Array, "*L T D"]:
    """Concatenates the heads and projects them: the sum over heads of each head through its part of W^O."""
    fits = (heads.shape[-3], heads.shape[-1]) == weight.shape[:2]
    _expect(fits, "merge_heads", "there must be a row a head", heads, weight)
    return jnp.einsum("...NTv,NvD->...TD", heads, weight, precision=lax.Precision.HIGHEST)


def multi_head_attention(
    params: AttentionParams,
    query_tokens: Float[Array, "*L T Dq"],
    key_tokens: Float[Array, "*L S Dk"],
    value_tokens: Float[Array, "*L S Dv"],
    mask: Bool[Array, "*#L #T #S"] | None = None,
    activation: Activation = jax.nn.softmax,
) -> Float[Array, "*L T D"]:
    """The whole algorithm; in self-attention all three token sources are one array.

    Args:
        params: the projections, of any widths and dtype.
        query_tokens: the tokens that attend.
        key_tokens: the tokens that are attended; as many as value_tokens.
        value_tokens: the tokens whose values are summed.
        mask: True to attend; the same for every head. A query that attends no key gives NaN, as the formula says.
        activation: the function from salience to weights.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> import jax
        >>> from attnax.reference import init_params, multi_head_attention
        >>> params = init_params(jax.random.key(0), d_model=16, num_heads=2, d_k=5, d_v=3)
        >>> tokens = jax.random.normal(jax.random.key(1), (7, 16))
        >>> multi_head_attention(params, tokens, tokens, tokens).shape
        (7, 16)
    """
    query = split_heads(project(query_tokens, params.query))
    key = split_heads(project(key_tokens, params.key))
    value = split_heads(project(value_tokens, params.value))
    heads = attention(query, key, value, None if mask is None else mask[..., None, :, :], activation)
    return merge_heads(heads, params.out)


def init_params(key: Array, *, d_model: int, num_heads: int, d_k: int, d_v: int) -> AttentionParams:
    """Normal weights that keep the variance of unit tokens, in JAX's default float dtype."""
    keys = jax.random.split(key, 4)
    query, key_, value = (
        jax.random.normal(k, (d_model, num_heads, width)) * d_model**-0.5
        for k, width in zip(keys[:3], (d_k, d_k, d_v), strict=True)
    )
    out = jax.random.normal(keys[3], (num_heads, d_v, d_model)) * (num_heads * d_v) ** -0.5
    return AttentionParams(query, key_, value, out)


def _expect(holds: bool, caller: str, rule: str, left: Array, right: Array) -> None:
    if not holds:
        raise ValueError(f"{caller}: {rule}; got shapes {left.shape} and {right.shape}.")
