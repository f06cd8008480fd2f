"""Token ids and positions as vectors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.typing import Array, ArrayLike, Float, Int, is_concrete

__all__ = ["LearnedPositionalEmbedding", "PositionalEncoding", "TokenEmbedding"]


class TokenEmbedding(nnx.Module):
    """A row of a table for each token id; `attend` gives the logits of tied embeddings.

    Args:
        rngs: for the initial table, normal with standard deviation 1 / sqrt(d_model): vectors have unit length, and
            so have the logits of tied embeddings unit variance.
        vocab_size: rows.
        d_model: width.
        dtype: of the result.
        param_dtype: of the table.
    """

    def __init__(
        self, rngs: nnx.Rngs, vocab_size: int, d_model: int, *, dtype: Any = None, param_dtype: Any = "float32"
    ):
        self.vocab_size, self.dtype = vocab_size, dtype or param_dtype
        init = nnx.initializers.normal(d_model**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, d_model), param_dtype))

    def __call__(self, input_ids: Int[ArrayLike, "*L"]) -> Float[Array, "*L D"]:
        """The vectors of `input_ids`.

        Raises:
            ValueError: a concrete id outside the vocabulary; under jit its vector is NaN.
        """
        return _look_up(self.embedding[...], input_ids, "TokenEmbedding", "token ids").astype(self.dtype)

    def attend(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Products of x with every row, summed in float32."""
        table = self.embedding[...].astype(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # one matrix product, as in Linear
        logits = jnp.einsum("MD,VD->MV", rows, table, preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], self.vocab_size)


class PositionalEncoding(nnx.Module):
    """Adds the sinusoids of Vaswani et al., section 3.5: sines in even features, cosines in odd ones.

    Args:
        max_len: number of positions.
        d_model: even width.
    """

    def __init__(self, max_len: int, d_model: int):
        if d_model % 2:
            raise ValueError(f"PositionalEncoding: d_model must be even; got d_model={d_model}.")
        self.max_len, self.d_model = max_len, d_model

    def __call__(
        self,
        x: Float[Array, "B T D"],
        start: int | Int[ArrayLike, ""] = 0,
        *,
        position_ids: Int[ArrayLike, "#B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """X plus the vectors of positions start ... start + T - 1, or of `position_ids`.

        Raises:
            ValueError: a concrete position past max_len; under jit its vector is NaN.
        """
        frequency = 10000.0 ** -(np.arange(0, self.d_model, 2, dtype=np.float64) / self.d_model)
        angles = np.arange(self.max_len, dtype=np.float64)[:, None] * frequency
        table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(self.max_len, self.d_model)
        positions = _positions(x, start, position_ids)
        return x + _look_up(jnp.asarray(table, jnp.float32), positions, "PositionalEncoding", "positions").astype(
            x.dtype
        )


class LearnedPositionalEmbedding(nnx.Module):
    """Adds a learned vector for each position.

    Args:
        rngs: for the initial table, normal with standard deviation 0.02.
        num_positions: rows of the table.
        d_model: width.
        param_dtype: of the table.
    """

    def __init__(self, rngs: nnx.Rngs, *, num_positions: int, d_model: int, param_dtype: Any = "float32"):
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (num_positions, d_model), param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        start: int | Int[ArrayLike, ""] = 0,
        *,
        position_ids: Int[ArrayLike, "#B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """X plus the vectors of positions start ... start + T - 1, or of `position_ids`.

        Raises:
            ValueError: a concrete position past the table; under jit its vector is NaN.
        """
        positions = _positions(x, start, position_ids)
        return x + _look_up(self.embedding[...], positions, "LearnedPositionalEmbedding", "positions").astype(x.dtype)


def _positions(x: Array, start: int | ArrayLike, position_ids: ArrayLike | None) -> ArrayLike:
    """(1 or B, T), still concrete if the arguments are; padding, at -1, gets position 0: nothing looks at it."""
    if position_ids is None:
        return start + np.arange(x.shape[1])[None, :]
    return np.maximum(np.asarray(position_ids), 0) if is_concrete(position_ids) else jnp.maximum(position_ids, 0)


def _look_up(table: Array, ids: ArrayLike, caller: str, what: str) -> Array:
    """Rows of the table. An index outside it raises where it can be seen, and gives NaN where it is traced."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{caller}: {what} must be integers; got dtype={ids.dtype}.")
    size = table.shape[0]
    if is_concrete(ids) and ids.size:
        known = np.asarray(ids)  # NumPy, because inside a jit even operations on known arrays are traced
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= size:
            raise ValueError(f"{caller}: {what} must be at least 0 and below {size}; got {low if low < 0 else high}.")
    ids = jnp.asarray(ids, jnp.int32)
    # A negative index would count from the end: send it past the end, where the fill value is.
    return table.at[jnp.where(ids < 0, size, ids)].get(mode="fill", fill_value=jnp.nan)
