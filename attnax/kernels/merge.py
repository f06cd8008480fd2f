"""merge_attention: attention over the union of several sets of keys, from attention over each set."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from attnax.checks import check_shape, wide_dtype
from attnax.kernels._core import softmax
from attnax.typing import Array, ArrayLike, Float

__all__ = ["merge_attention"]


def merge_attention(
    parts: Sequence[tuple[Float[ArrayLike, "B N T Hv"], Float[ArrayLike, "B N T"]]],
) -> tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """sum_i exp(lse_i - lse) out_i with lse = log(sum_i exp(lse_i)): attention over the keys of all parts.

    Each part is what a kernel returns with `return_lse=True` for the same queries and a set of keys of its own. Parts
    may come from different kernels. Outputs and log-sum-exps get gradients.

    Args:
        parts: one or more pairs (out, lse), of shapes (batch, num_heads, T, value_dim) and (batch, num_heads, T). The
            outs have one floating dtype. A query that attends no key of a part has the out 0 and the lse -inf there.

    Returns:
        (out, lse): out in the dtype of the parts, lse in float32 or wider. A query that attends no key of any part has
        the out 0 and the lse -inf. A lse of NaN or +inf gives NaN.

    Raises:
        ValueError: no part, or shapes or dtypes that do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnax import flash_attention, merge_attention
        >>> query, key = jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 10, 8))
        >>> parts = [flash_attention(query, x, x, return_lse=True) for x in (key[:, :, :6], key[:, :, 6:])]
        >>> out, lse = merge_attention(parts)
        >>> out.shape, lse.shape
        ((1, 2, 3, 8), (1, 2, 3))

    References:
        J. Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024,
        https://arxiv.org/abs/2402.05099.
    """
    arrays = [(jnp.asarray(out), jnp.asarray(lse)) for out, lse in parts]
    if not arrays:
        raise ValueError("merge_attention: parts must hold at least one pair (out, lse); got no part.")
    first, _ = arrays[0]
    check_shape("merge_attention", "out", first, ("batch", "num_heads", "T", "value_dim"))
    for n, (out, lse) in enumerate(arrays):
        check_shape("merge_attention", f"out of part {n}", out, first.shape)
        check_shape("merge_attention", f"lse of part {n}", lse, first.shape[:3])
        if out.dtype != first.dtype or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (out, lse)):
            raise ValueError(
                "merge_attention: outs must have one floating dtype, and lses a floating one; got "
                f"out.dtype={first.dtype} of part 0, out.dtype={out.dtype} and lse.dtype={lse.dtype} of part {n}. "
                "Cast them with `.astype`."
            )
    dtype = wide_dtype(first.dtype)
    states = [softmax.as_state(out.astype(dtype), softmax.in_log2(lse.astype(dtype))) for out, lse in arrays]
    out, lse = softmax.finish(functools.reduce(softmax.merge, states))
    return out.astype(first.dtype), softmax.in_nats(lse)
