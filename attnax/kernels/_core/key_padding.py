"""The masks of attention without a score matrix: causal, key padding, or both."""

from __future__ import annotations

import jax.numpy as jnp

from attnax.masks import And, Causal, Dense, Lengths, Mask, as_mask
from attnax.typing import Array, ArrayLike, MaskMod


def split_mask(
    caller: str, mask: Mask | MaskMod | ArrayLike | None, score_shape: tuple[int, int, int, int]
) -> tuple[bool, Array]:
    """(whether `mask` is causal, True for each real key: booleans (B, S) or (1, S)).

    Raises ValueError if the mask does not fit `score_shape`, NotImplementedError for a mask with any other part.
    """
    batch, _, _, seq_kv = score_shape
    causal, real = False, jnp.ones((1, seq_kv), bool)
    if mask is None:
        return causal, real
    mask = as_mask(mask)
    mask.check(caller, score_shape)
    b, kv = jnp.arange(batch)[:, None], jnp.arange(seq_kv)[None, :]
    parts = [mask]
    while parts:
        part = parts.pop()
        if isinstance(part, And):
            parts += [part.left, part.right]
        elif isinstance(part, Causal):
            causal = True
        elif isinstance(part, Lengths) or (isinstance(part, Dense) and part.array.shape[1:3] == (1, 1)):
            allowed = part(b, 0, 0, kv)
            real = real & allowed.reshape((1,) * (2 - allowed.ndim) + allowed.shape)
        else:
            got = f"a boolean array of shape {part.array.shape}" if isinstance(part, Dense) else type(part).__name__
            raise NotImplementedError(
                f"{caller}: mask must be masks.causal(), key padding (masks.padding(...) or a boolean array that "
                f"broadcasts to (batch, 1, 1, seq_kv)), or both joined by &; got {got}. "
                "Use a softmax kernel for any other mask."
            )
    return causal, real
