"""One vector for a text."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.checks import wide_dtype
from attnax.config import Pool
from attnax.models.transformer import TransformerEncoder
from attnax.nn._run import run_of
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["SentenceEncoder"]


class SentenceEncoder(nnx.Module):
    """A vector of length 1 for each text: the mean of an encoder's hidden states, or the state of the first token.

    The product of two such vectors is the cosine of the angle between them.

    Args:
        encoder: a TransformerEncoder.
        pool: "mean" over the real tokens, or "cls" for the first real token.
        normalize: whether vectors have length 1.

    Raises:
        ValueError: an unknown pool.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerEncoder
        >>> from attnax.models import SentenceEncoder
        >>> encoder = TransformerEncoder(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> embed = SentenceEncoder(encoder)
        >>> embed(jnp.array([[3, 1, 4], [1, 5, 0]]), padding_mask=jnp.array([[True] * 3, [True, True, False]])).shape
        (2, 8)

    References:
        N. Reimers and I. Gurevych, "Sentence-BERT", 2019, https://arxiv.org/abs/1908.10084.
    """

    def __init__(self, encoder: TransformerEncoder, *, pool: Pool = "mean", normalize: bool = True):
        if pool not in get_args(Pool):
            raise ValueError(f"SentenceEncoder: pool must be one of {', '.join(get_args(Pool))}; got pool={pool!r}.")
        self.encoder, self.pool, self.normalize = encoder, pool, normalize

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        padding_mask: Bool[ArrayLike, "B T"] | None = None,
        token_type_ids: Int[ArrayLike, "B T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B D"]:
        """float32 vectors (batch, d_model); arguments are as in `TransformerEncoder`.

        A row with no real token has the vector 0.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        hidden = run_of(self.encoder)(
            input_ids, padding_mask=padding_mask, token_type_ids=token_type_ids, **options
        ).hidden
        hidden = hidden.astype(wide_dtype(hidden.dtype))
        real = jnp.ones(hidden.shape[:2], bool) if padding_mask is None else jnp.asarray(padding_mask)
        if self.pool == "cls":  # padding may stand left
            real &= jnp.cumsum(real, axis=1) == 1
        count = jnp.maximum(real.sum(1, keepdims=True), 1)
        vectors = jnp.where(real[..., None], hidden, 0).sum(1) / count.astype(hidden.dtype)
        if not self.normalize:
            return vectors
        # The maximum gives the vector 0 a finite gradient.
        return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(1, keepdims=True), 1e-24))
