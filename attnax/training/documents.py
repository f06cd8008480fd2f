"""The documents of packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnax.checks import check_shape
from attnax.typing import Array, Int

__all__ = ["find_documents"]


def find_documents(tokens: Int[Array, "B T"], document_token: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The number of each token's document in its row, and the token's index within the document.

    A row may begin within a document; that part of the document has number 0, and its first token has index 0.

    Raises:
        ValueError: tokens whose shape is not (batch, length).

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.training import find_documents
        >>> documents, positions = find_documents(jnp.array([[7, 8, 0, 7, 0, 9]]), 0)
        >>> documents.tolist(), positions.tolist()
        ([[0, 0, 1, 1, 2, 2]], [[0, 1, 0, 1, 0, 1]])
    """
    check_shape("find_documents", "tokens", tokens, ("batch", "length"), integers=True)
    starts = tokens == document_token
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    begun = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), index - begun
