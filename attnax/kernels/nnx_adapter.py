"""The kernels in the call form of `flax.nnx.MultiHeadAttention(attention_fn=...)`; needs no Flax itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.kernels.flash import flash_attention
from attnax.masks import Mask, as_mask, causal, mask_argument
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Float, MaskMod, ScoreMod, Shaped

__all__ = ["NnxAttention", "nnx_attention_fn"]


def nnx_attention_fn(
    attention_fn: Callable[..., Any] = flash_attention,
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
) -> NnxAttention:
    """Adapts `attention_fn` to the argument `attention_fn=` of `flax.nnx.MultiHeadAttention`; the layer stays the same.

    The layer's own masks (arrays in which nonzero attends, as in Flax, or a Mask object given as its `mask`) and its
    `is_causal` are joined to `mask`. The function differs from Flax's in these points:

    - a query with nothing to attend gives 0, not the mean of the values;
    - dropout draws a bit for each weight and ignores `broadcast_dropout`: the rate is the same, but rows of the batch
      and heads do not share their bits;
    - sums are in float32 and products at the highest precision; `precision` is ignored;
    - `sow_weights=True` and `input_positions` raise NotImplementedError.

    Args:
        attention_fn: obeys `attnax.AttentionFn`.
        mask: True to attend, for every call: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array. With
            several batch axes, b counts them as one.
        score_mod: `(scores, b, h, q, kv) -> scores` on the scaled scores.

    Returns:
        A callable pytree. If `mask` or `score_mod` hold arrays, wrap the pytree in `flax.nnx.data(...)` for the layer:
        otherwise the layer takes the pytree for a constant and says so. With the wrapper, the `nnx.Param` of a score
        mod that is a module gets gradients. Arrays that a plain function captures are constants.

    Raises:
        ValueError: `mask` is of no such kind. In a call: shapes that do not fit, or `is_causal` with one query for
            several keys, as in decoding: `is_causal` counts from index 0, and the layer masks its cache by itself.
        NotImplementedError: in a call, `sow_weights=True` or `input_positions`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.kernels.nnx_adapter import nnx_attention_fn
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=6, decode=False, attention_fn=nnx_attention_fn(), rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((3, 5, 6)), is_causal=True).shape
        (3, 5, 6)
    """
    return NnxAttention(
        attention_fn,
        None if mask is None else as_mask(mask),
        None if score_mod is None else function_pytree(score_mod),
    )


@pytree_dataclass
class NnxAttention:
    """The result of `nnx_attention_fn`. Objects of equal parts are equal, so an equal layer compiles nothing new."""

    attention_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    mask: Mask | None
    score_mod: ScoreMod | None  # a pytree

    def __call__(
        self,
        query: Float[ArrayLike, "*batch T N H"],
        key: Float[ArrayLike, "*batch S K H"],
        value: Float[ArrayLike, "*batch S K Hv"],
        *,
        mask: Any = None,
        dropout_rng: Shaped[Array, "..."] | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Float[Array, "*batch T N Hv"]:
        """The call of `flax.nnx.MultiHeadAttention`, with its arguments."""
        if module is not None:
            raise NotImplementedError(
                "nnx_attention_fn: the attention weights are never kept, so there are none to sow; got "
                f"sow_weights=True (module={type(module).__name__}). Compute them with "
                "attnax.visualize.attention_weights."
            )
        if input_positions is not None:
            raise NotImplementedError(
                "nnx_attention_fn: this function does not rotate queries and keys by positions; got "
                "input_positions. Use attnax.MultiHeadAttention with use_rope=True, or rotate them before."
            )
        batch = query.shape[:-3]
        if min(query.ndim, key.ndim, value.ndim) < 3 or not batch == key.shape[:-3] == value.shape[:-3]:
            raise ValueError(
                "nnx_attention_fn: query, key and value must be (batch..., length, heads, head_dim) with one batch; "
                f"got query.shape={query.shape}, key.shape={key.shape}, value.shape={value.shape}."
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (_merge(jnp.asarray(x, dtype), len(batch)).swapaxes(1, 2) for x in (query, key, value))
        batch_size, num_heads, seq_q, _ = query.shape
        score_shape = batch_size, num_heads, seq_q, key.shape[2]
        joined = self.mask
        if mask is not None:
            given = _one_batch_axis(mask, batch)
            joined = given if joined is None else joined & given
        if is_causal:
            if seq_q == 1 < key.shape[2]:
                raise ValueError(
                    "nnx_attention_fn: is_causal counts positions from index 0, so one query would attend the first "
                    f"key only; got {key.shape[2]} keys. Leave it out when decoding: the layer masks its own cache."
                )
            joined = causal() if joined is None else joined & causal()
        out = self.attention_fn(
            query,
            key,
            value,
            mask=mask_argument("nnx_attention_fn", self.attention_fn, joined, score_shape),
            score_mod=self.score_mod,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
        ).swapaxes(1, 2)
        return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])


def _merge(x: Array, num_axes: int) -> Array:
    """The first axes as one; a single first axis stays as it is, so that a mesh may cut it."""
    return x if num_axes == 1 else x.reshape(math.prod(x.shape[:num_axes]), *x.shape[num_axes:])


def _one_batch_axis(mask: Any, batch: tuple[int, ...]) -> Mask:
    """Flax's mask (batch..., heads, query, key), of numbers or booleans, as a Mask over one batch axis."""
    if not isinstance(mask, jax.Array | np.ndarray):
        return as_mask(mask)
    mask = jnp.asarray(mask).astype(bool)
    if mask.ndim > 3 and len(batch) != 1:
        lead, rest = mask.shape[:-3], mask.shape[-3:]
        if len(lead) > len(batch) or any(
            have not in (1, want) for have, want in zip(reversed(lead), reversed(batch), strict=False)
        ):
            raise ValueError(
                f"nnx_attention_fn: mask must broadcast to (batch..., heads, query, key) with batch={batch}; "
                f"got mask.shape={mask.shape}."
            )
        mask = jnp.broadcast_to(mask, (*batch, *rest)).reshape(math.prod(batch), *rest)
    return as_mask(mask)
