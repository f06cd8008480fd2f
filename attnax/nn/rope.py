"""Rotary position embeddings: a query and a key are turned by their positions, so their product sees the distance.

Angles are computed on the host in float64: in float32 the angle of position 131072 would be off by 0.004 radians.
Positions known only under jit are looked up digit by digit (base 256) and the rotations multiplied, which is exact
to float32 rounding for any int32 position, with four tables of 256 rows.

References: J. Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from attnax.typing import Array, ArrayLike, Float, Int, is_concrete

__all__ = ["RotaryEmbedding", "apply_rope", "rope_cos_sin_from_positions", "rope_cos_sin_table", "rope_inv_freq"]


def rope_inv_freq(head_dim: int, base: float = 10000.0) -> np.ndarray:
    """Base ** (-2i / head_dim) for i < head_dim / 2: radians per position, float64 on the host.

    Raises:
        ValueError: an odd head_dim.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_inv_freq: head_dim must be even and at least 2; got head_dim={head_dim}.")
    return base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rope_cos_sin_table(
    max_seq_len: int, head_dim: int, base: float = 10000.0, dtype: Any = jnp.float32
) -> tuple[Float[Array, "S C"], Float[Array, "S C"]]:
    """Cosines and sines of positions 0 ... max_seq_len - 1, each (max_seq_len, head_dim / 2)."""
    angles = np.arange(max_seq_len, dtype=np.float64)[:, None] * rope_inv_freq(head_dim, base)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rope_cos_sin_from_positions(
    position_ids: Int[ArrayLike, "*L"],
    head_dim: int,
    base: float = 10000.0,
    table_len: int | None = None,
    out_dtype: Any = jnp.float32,
) -> tuple[Float[Array, "*L C"], Float[Array, "*L C"]]:
    """Cosines and sines of any positions, each (*position_ids.shape, head_dim / 2), within 1e-6 up to 2 ** 31.

    Args:
        position_ids: int32; a negative one (padding) is turned like position 0.
        head_dim: even.
        base: of the wavelengths.
        table_len: positions from here on are an error where they can be seen (not under jit).
        out_dtype: of the result.

    Raises:
        ValueError: a concrete position at or past table_len.
    """
    if table_len is not None and is_concrete(position_ids) and np.size(position_ids):
        last = int(np.asarray(position_ids).max())
        if last >= table_len:
            raise ValueError(f"rope: positions must be below {table_len}; got position {last}. Use a longer table.")
    inv_freq = rope_inv_freq(head_dim, base)
    position = jnp.maximum(jnp.asarray(position_ids, jnp.int32), 0)
    cos, sin = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    for digit in range(4):
        angles = (np.arange(256, dtype=np.float64) * 256**digit)[:, None] * inv_freq
        index = (position >> (8 * digit)) & 255
        digit_cos = jnp.asarray(np.cos(angles), jnp.float32)[index]
        digit_sin = jnp.asarray(np.sin(angles), jnp.float32)[index]
        cos, sin = cos * digit_cos - sin * digit_sin, sin * digit_cos + cos * digit_sin
    return cos.astype(out_dtype), sin.astype(out_dtype)


def apply_rope(x: Float[Array, "*L H"], cos: Float[Array, ...], sin: Float[Array, ...]) -> Float[Array, "*L H"]:
    """Turns each pair (x[i], x[i + head_dim / 2]) by its angle; computed in float32, returned in the dtype of x.

    Args:
        x: (..., T, head_dim).
        cos: broadcasts to (..., T, head_dim / 2), as `rope_cos_sin_table` gives it.
        sin: the same.
    """
    cos, sin = (table.reshape((1,) * (x.ndim - table.ndim) + table.shape) for table in (cos, sin))
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class RotaryEmbedding:
    """`rotary(x, positions)` turns queries or keys by their positions; it holds no arrays and no parameters.

    Args:
        head_dim: even.
        max_positions: a concrete position from here on is an error; None sets no limit.
        base: of the wavelengths.
        dtype: of cosines and sines.
    """

    def __init__(
        self, head_dim: int, max_positions: int | None = None, *, base: float = 10000.0, dtype: Any = jnp.float32
    ):
        rope_inv_freq(head_dim, base)  # raises for an odd head_dim here rather than in the first call
        self.head_dim, self.max_positions, self.base, self.dtype = head_dim, max_positions, base, dtype

    def __call__(
        self,
        x: Float[Array, "B N T H"],
        position_ids: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
    ) -> Float[Array, "B N T H"]:
        """X turned by `position_ids`, by default 0 ... T - 1."""
        if position_ids is None:
            length = x.shape[2]
            if self.max_positions is not None and length > self.max_positions:
                raise ValueError(
                    f"rope: positions must be below {self.max_positions}; got a sequence of {length}. "
                    "Use a longer table."
                )
            cos, sin = rope_cos_sin_table(length, self.head_dim, self.base, self.dtype)
            return apply_rope(x, cos, sin)
        cos, sin = rope_cos_sin_from_positions(position_ids, self.head_dim, self.base, self.max_positions, self.dtype)
        return apply_rope(x, cos[..., None, :, :], sin[..., None, :, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RotaryEmbedding) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.head_dim, self.max_positions, self.base, str(self.dtype)))
