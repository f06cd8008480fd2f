"""Exact attention as a Pallas kernel where the platform has one, by a predicate that can be asked."""

from __future__ import annotations

from typing import Any

import jax

from attnax.kernels._blockwise import attend
from attnax.masks import Mask, takes_mask_objects
from attnax.typing import Array, ArrayLike, Float, MaskMod, ScoreMod, Shaped

__all__ = ["pallas_flash_attention", "why_not_pallas"]


@takes_mask_objects
def pallas_flash_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, ...] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ key^T) @ value in tiles of block_q queries by block_kv keys; memory O(T + S).

    On a platform without a Pallas backend for it, where `why_not_pallas` gives a reason, the tiles run in the engine of
    `memory_efficient_attention`. Arguments, results and errors are its own, but for the two block sizes.

    Args:
        query: (batch, num_heads, seq_q, head_dim).
        key: (batch, num_kv_heads, seq_kv, head_dim).
        value: (batch, num_kv_heads, seq_kv, value_dim).
        mask: True to attend.
        score_mod: `(scores, b, h, q, kv) -> scores`.
        dropout_rng: key of the attention dropout.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.
        block_q: queries of a tile, by default chosen by shape.
        block_kv: keys of a tile, by default chosen by shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import pallas_flash_attention
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> pallas_flash_attention(x, x, x, block_q=16, block_kv=32).shape
        (1, 4, 37, 8)
    """
    options: dict[str, Any] = {
        "mask": mask,
        "score_mod": score_mod,
        "dropout_rng": dropout_rng,
        "dropout_rate": dropout_rate,
        "deterministic": deterministic,
        "scale": scale,
        "return_lse": return_lse,
    }
    return attend("pallas_flash_attention", query, key, value, block_size=(block_q, block_kv), **options)


def why_not_pallas() -> str:
    """Why `pallas_flash_attention` runs in the blockwise engine on this machine.

    Example:
        >>> from attnax import why_not_pallas
        >>> why_not_pallas()
        'this version has no Pallas kernel yet, for cpu or any other platform'
    """
    return f"this version has no Pallas kernel yet, for {jax.default_backend()} or any other platform"
