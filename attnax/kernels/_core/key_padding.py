"""The masks that attention without a score matrix can obey: causal, key padding, or both."""

from __future__ import annotations

import jax.numpy as jnp

from attnax.masks import And, Causal, Dense, Lengths, Mask, as_mask
from attnax.typing import Array, ArrayLike, MaskMod


def split_mask(
    caller: str, mask: Mask | MaskMod | ArrayLike | None, full: tuple[int, int, int, int]
) -> tuple[bool, Array]:
    """Whether `mask` is causal, and which keys it lets be attended at all, booleans (B, S) or (1, S).

    Raises:
        ValueError: the mask does not fit (B, N, T, S) = `full`.
        NotImplementedError: the mask depends on anything else, or a part is no such mask.
    """
    causal, real = False, jnp.ones((1, full[3]), bool)
    if mask is None:
        return causal, real
    mask = as_mask(mask)
    mask.check(caller, full)
    b, kv = jnp.arange(full[0])[:, None], jnp.arange(full[3])[None, :]
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
