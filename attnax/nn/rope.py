"""Rotary position embeddings: queries and keys are rotated by their positions, so products depend on the distance.

Angles are computed on the host in float64: in float32 the angle of position 131072 would be off by 0.004 radians.
A traced position is looked up digit by digit (base 256) in four tables of 256 rows; the product of the rotations is
exact to float32 rounding for any int32 position. float64 heads are rotated in float64.

A `RopeScaling` lowers frequencies, for texts longer than the training length.

References:
    J. Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864.
    "linear": S. Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023,
        https://arxiv.org/abs/2306.15595.
    "ntk" and "yarn": B. Peng et al., "YaRN", 2023, https://arxiv.org/abs/2309.00071, sections 3.1, 3.2 and 3.4.
    "llama3": Meta, rotary scaling of Llama 3.1, 2024, https://github.com/meta-llama/llama-models.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.checks import check_shape, is_concrete, wide_dtype
from attnax.config import RopeScaling
from attnax.nn.embeddings import take_rows
from attnax.typing import Array, ArrayLike, Float, Int

__all__ = [
    "RotaryEmbedding",
    "apply_rope",
    "rope_attention_factor",
    "rope_cos_sin_from_positions",
    "rope_cos_sin_table",
    "rope_inv_freq",
]


def rope_inv_freq(head_dim: int, base: float = 10000.0, *, scaling: RopeScaling | None = None) -> np.ndarray:
    """base ** (-2i / head_dim) for i < head_dim / 2: radians per position, float64 on the host, lowered by `scaling`.

    Args:
        head_dim: even; with "ntk" at least 4.
        base: of the wavelengths.
        scaling: "ntk" raises the base until the last frequency is divided by factor; the first stays. All other
            kinds divide a share of each frequency by factor.

    Raises:
        ValueError: an odd head_dim, or one too small for "ntk".
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_inv_freq: head_dim must be even and at least 2; got head_dim={head_dim}.")
    if scaling is not None and scaling.kind == "ntk":
        if head_dim == 2:
            raise ValueError("rope_inv_freq: ntk must have a second frequency to lower; got head_dim=2. Use linear.")
        base = base * scaling.factor ** (head_dim / (head_dim - 2))
    inv_freq = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None or scaling.kind == "ntk":
        return inv_freq
    kept = _kept_share(inv_freq, base, scaling)
    return kept * inv_freq + (1.0 - kept) * inv_freq / scaling.factor


def rope_attention_factor(scaling: RopeScaling | None) -> float:
    """The factor of cosines and sines: 0.1 log(factor) + 1 for "yarn", unless given, and 1 for every other kind.

    The square of the factor, 1 / temperature in the paper, multiplies the product of a rotated query and key.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    return 0.1 * math.log(scaling.factor) + 1.0


def rope_cos_sin_table(
    max_seq_len: int,
    head_dim: int,
    base: float = 10000.0,
    dtype: Any = jnp.float32,
    *,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "S C"], Float[Array, "S C"]]:
    """Cosines and sines of positions 0 ... max_seq_len - 1, each (max_seq_len, head_dim / 2), both with `scaling`."""
    angles = np.arange(max_seq_len, dtype=np.float64)[:, None] * rope_inv_freq(head_dim, base, scaling=scaling)
    factor = rope_attention_factor(scaling)
    return jnp.asarray(factor * np.cos(angles), dtype), jnp.asarray(factor * np.sin(angles), dtype)


def rope_cos_sin_from_positions(
    position_ids: Int[ArrayLike, "*L"],
    head_dim: int,
    base: float = 10000.0,
    table_len: int | None = None,
    out_dtype: Any = jnp.float32,
    *,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "*L C"], Float[Array, "*L C"]]:
    """Cosines and sines of any positions, each (*position_ids.shape, head_dim / 2), within 1e-6 up to 2 ** 31.

    Args:
        position_ids: int32; a negative position (padding) counts as position 0.
        head_dim: even.
        base: of the wavelengths.
        table_len: a concrete position of table_len or more is an error; a traced position is not.
        out_dtype: of the result.
        scaling: of the frequencies; "yarn" also multiplies the result by `rope_attention_factor`.

    Raises:
        ValueError: a concrete position at or past table_len.
    """
    if table_len is not None and is_concrete(position_ids) and np.size(position_ids):
        last = int(np.asarray(position_ids).max())
        if last >= table_len:
            raise ValueError(f"rope: positions must be below {table_len}; got position {last}. Use a longer table.")
    return _cos_sin(jnp.asarray(position_ids, jnp.int32), head_dim, base, jnp.dtype(out_dtype), scaling)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))  # traced once for the queries and keys of all layers
def _cos_sin(
    position: Array, head_dim: int, base: float, out_dtype: Any, scaling: RopeScaling | None
) -> tuple[Array, Array]:
    inv_freq = rope_inv_freq(head_dim, base, scaling=scaling)
    position = jnp.maximum(position, 0)
    dtype = wide_dtype(out_dtype)
    cos, sin = jnp.asarray(rope_attention_factor(scaling), dtype), jnp.zeros((), dtype)
    for digit in range(4):
        angles = (np.arange(256, dtype=np.float64) * 256**digit)[:, None] * inv_freq
        index = (position >> (8 * digit)) & 255
        digit_cos, digit_sin = (take_rows(jnp.asarray(x, dtype), index) for x in (np.cos(angles), np.sin(angles)))
        cos, sin = cos * digit_cos - sin * digit_sin, sin * digit_cos + cos * digit_sin
    return cos.astype(out_dtype), sin.astype(out_dtype)


def apply_rope(x: Float[Array, "*L H"], cos: Float[Array, "..."], sin: Float[Array, "..."]) -> Float[Array, "*L H"]:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its angle; computed in at least float32, returned in x's dtype.

    Args:
        x: (..., T, head_dim).
        cos: broadcasts to (..., T, head_dim / 2), as `rope_cos_sin_table` gives it.
        sin: the same.
    """
    cos, sin = (table.reshape((1,) * (x.ndim - table.ndim) + table.shape) for table in (cos, sin))
    first, second = jnp.split(x.astype(wide_dtype(x.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class RotaryEmbedding:
    """`rotary(x, positions)` rotates queries or keys by their positions; the object holds no arrays.

    The first int(head_dim * fraction) features of a head are rotated, in split halves of their own; the rest stays.

    Args:
        head_dim: features of a head.
        max_positions: a concrete position of max_positions or more is an error; None sets no limit.
        base: of the wavelengths.
        dtype: of cosines and sines, by default float32, or float64 for a float64 x.
        fraction: above 0, at most 1, such that an even number of features is rotated.
        scaling: of the frequencies, for texts longer than the trained ones.

    Raises:
        ValueError: fraction is out of its range, the number of rotated features is odd or 0, a concrete position is
            at or past max_positions, or x or position_ids are of another shape.
    """

    def __init__(
        self,
        head_dim: int,
        max_positions: int | None = None,
        *,
        base: float = 10000.0,
        dtype: Any = None,
        fraction: float = 1.0,
        scaling: RopeScaling | None = None,
    ):
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"RotaryEmbedding: fraction must be above 0 and at most 1; got fraction={fraction}.")
        self.head_dim, self.max_positions, self.base, self.dtype = head_dim, max_positions, base, dtype
        self.fraction, self.scaling = fraction, scaling
        if self.rotated_dim < 2 or self.rotated_dim % 2:
            raise ValueError(
                "RotaryEmbedding: int(head_dim * fraction) must be even and at least 2; "
                f"got head_dim={head_dim}, fraction={fraction}."
            )
        rope_inv_freq(self.rotated_dim, base, scaling=scaling)  # an error is raised here, not in the first call

    @property
    def rotated_dim(self) -> int:
        """The number of rotated features of a head."""
        return int(self.head_dim * self.fraction)

    def __call__(
        self, x: Float[Array, "B N T H"], position_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"] | None = None
    ) -> Float[Array, "B N T H"]:
        """x rotated by `position_ids`, by default 0 ... T - 1."""
        check_shape("RotaryEmbedding", "x", x, ("batch", "heads", "length", self.head_dim))
        if position_ids is not None:
            batch, length = x.shape[0], x.shape[2]
            shapes = (length,), (1, length), (batch, length)
            check_shape("RotaryEmbedding", "position_ids", position_ids, *shapes, integers=True)
        dtype = wide_dtype(x.dtype) if self.dtype is None else self.dtype
        if position_ids is None:
            length = x.shape[2]
            if self.max_positions is not None and length > self.max_positions:
                raise ValueError(
                    f"rope: positions must be below {self.max_positions}; got a sequence of {length}. "
                    "Use a longer table."
                )
            cos, sin = rope_cos_sin_table(length, self.rotated_dim, self.base, dtype, scaling=self.scaling)
        else:
            cos, sin = rope_cos_sin_from_positions(
                position_ids, self.rotated_dim, self.base, self.max_positions, dtype, scaling=self.scaling
            )
            cos, sin = cos[..., None, :, :], sin[..., None, :, :]
        if self.rotated_dim == self.head_dim:
            return apply_rope(x, cos, sin)
        turned, rest = jnp.split(x, [self.rotated_dim], axis=-1)
        return jnp.concatenate([apply_rope(turned, cos, sin), rest], axis=-1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RotaryEmbedding) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.head_dim, self.max_positions, self.base, str(self.dtype), self.fraction, self.scaling))


def _kept_share(inv_freq: np.ndarray, base: float, scaling: RopeScaling) -> np.ndarray:
    """The share of each frequency that is kept, from 1 for the fastest rotation to 0 for the slowest."""
    if scaling.kind == "linear":
        return np.zeros_like(inv_freq)
    length = scaling.original_max_len
    assert length is not None
    if scaling.kind == "llama3":
        turns = length * inv_freq / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)
    # yarn: the fractional i at which base ** (-2i / head_dim) makes beta_fast and beta_slow turns within the length.
    # The share falls linearly between the two. Limits and 0.001 are as in Hugging Face transformers.
    head_dim = 2 * len(inv_freq)
    first, last = (
        head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    return 1.0 - np.clip((np.arange(len(inv_freq)) - first) / (last - first), 0.0, 1.0)
