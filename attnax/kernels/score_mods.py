"""Score mods: functions `(scores, b, h, q, kv) -> scores` on the scaled float32 scores, before the softmax.

The mods made here are callable pytrees: their arrays get gradients, and a mod that is rebuilt on every call compiles
nothing new. A mod that only forbids pairs carries its mask, so that kernels skip the same tiles as with `mask=`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from attnax import masks
from attnax.checks import check_broadcast, is_concrete
from attnax.masks import ComposedScoreMod, Mask, MaskedScoreMod, NoTruth, as_mask, index_grid, split_score_mod
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Index, Int, MaskMod, ScoreMod, ScoreShape

__all__ = [
    "additive_bias_mod",
    "alibi_mod",
    "alibi_slopes",
    "causal_mod",
    "compose_score_mods",
    "document_mask_mod",
    "mask_mod_to_boolean_mask",
    "mask_mod_to_score_mod",
    "prefix_lm_mod",
    "relative_bias_mod",
    "relative_bucket",
    "relative_table_mod",
    "sliding_window_mod",
    "soft_cap_mod",
]


class PerHead(NoTruth):
    """A score mod that holds an array with an entry for each head."""

    _per_head: ClassVar[tuple[str, str, int]]  # the public constructor, the array, and its axis of heads

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises ValueError unless the array has an entry for each of the query's heads."""
        constructor, name, axis = self._per_head
        shape, heads = getattr(self, name).shape, score_shape[1]
        if shape[axis] != heads:
            raise ValueError(
                f"{caller}: {constructor} must be made for the query's {heads} heads; got {name}.shape={shape}."
            )


@pytree_dataclass
class Alibi(PerHead):
    """Scores minus `slopes[h] * |q - kv|`."""

    slopes: Array  # (N,)
    _per_head = "alibi_mod", "slopes", 0

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return scores - self.slopes.astype(scores.dtype)[h] * jnp.abs(jnp.subtract(q, kv)).astype(scores.dtype)


@pytree_dataclass
class AdditiveBias(NoTruth):
    """Scores plus `bias[b, h, q, kv]`."""

    bias: Array  # (B|1, N|1, T|1, S|1)

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        indices = [0 if size == 1 else i for i, size in zip((b, h, q, kv), self.bias.shape, strict=True)]
        # Positions may lie past the array (a cache has spare room). They get NaN, not the bias of another token.
        inside = functools.reduce(jnp.logical_and, map(jnp.less, indices, self.bias.shape))
        return scores + jnp.where(inside, self.bias.astype(scores.dtype).at[tuple(indices)].get(mode="clip"), jnp.nan)

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises ValueError unless the bias broadcasts to (B, N, T, S) = `score_shape`."""
        check_broadcast(f"{caller}: additive_bias_mod", "bias", self.bias.shape, score_shape)

    @property
    def num_positions(self) -> int | None:
        """The number of positions that the bias covers; None if there is no limit."""
        return masks.positions_of(self.bias)


@pytree_dataclass
class SoftCap(NoTruth):
    """`cap * tanh(scores / cap)`."""

    cap: float | Array

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.cap * jnp.tanh(scores / self.cap)


@pytree_dataclass
class BucketedBias(PerHead):
    """Scores plus `table[bucket, h]` for T5's bucket of `kv - q`."""

    table: Array  # (num_buckets, N)
    max_distance: int = dataclasses.field(metadata={"static": True})
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    _per_head = "relative_bias_mod", "table", 1

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        bucket = relative_bucket(
            jnp.subtract(kv, q),
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return scores + self.table.astype(scores.dtype)[bucket, h]


@pytree_dataclass
class ClippedBias(PerHead):
    """Scores plus `table[h, clip(q - kv, -clip, clip) + clip]`."""

    table: Array  # (N, 2 * clip + 1)
    _per_head = "relative_table_mod", "table", 0

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        clip = self.table.shape[1] // 2
        return scores + self.table.astype(scores.dtype)[h, jnp.clip(jnp.subtract(q, kv), -clip, clip) + clip]


def compose_score_mods(*mods: ScoreMod | None) -> ScoreMod | None:
    """One score mod that applies `mods` in order, skipping None. One mod is returned unchanged; no mods give None.

    A pair that a mod forbids stays forbidden, also after later mods. Masks (`causal_mod()` and the like) are applied
    together at the end, so that kernels find them.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import causal_mod, compose_score_mods
        >>> mod = compose_score_mods(lambda s, b, h, q, kv: s + 1.0, causal_mod(), None, lambda s, b, h, q, kv: s * 2.0)
        >>> [float(mod(jnp.float32(3.0), 0, 0, 1, kv)) for kv in range(3)]
        [8.0, 8.0, -inf]
    """
    present = [mod for mod in mods if mod is not None]
    if len(present) == 1:
        return present[0]
    split = [split_score_mod(mod) for mod in present]
    forbidding = [mask for _, mask in split if mask is not None]
    parts: list[ScoreMod] = []
    for changing, _ in split:
        if changing is not None:
            parts += changing.mods if isinstance(changing, ComposedScoreMod) else (changing,)
    rest = parts[0] if len(parts) == 1 else ComposedScoreMod(tuple(map(function_pytree, parts))) if parts else None
    if not forbidding:
        return rest
    return MaskedScoreMod(function_pytree(rest), functools.reduce(lambda left, right: left & right, forbidding))


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """ALiBi's slopes, `2 ** (-8 * (i + 1) / num_heads)` for head i, in float32.

    If num_heads is no power of two, the slopes of the next lower power of two come first, then every other slope of
    twice that many heads.

    Raises:
        ValueError: num_heads is below 1.

    Example:
        >>> from attnax.kernels.score_mods import alibi_slopes
        >>> alibi_slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]

    References:
        O. Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        2021, https://arxiv.org/abs/2108.12409.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1; got num_heads={num_heads}.")
    lower = 1 << (num_heads.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, lower + 1) / lower, np.arange(1, 2 * lower + 1, 2) / (2 * lower)])
    return jnp.asarray(2.0 ** (-8.0 * exponents[:num_heads]), jnp.float32)


def alibi_mod(num_heads: int) -> ScoreMod:
    """`scores - slope[h] * |q - kv|`: each head prefers near keys, to its own degree.

    The paper is about causal attention, where this is `scores + slope[h] * (kv - q)`; keys after the query get the bias
    of keys before it. Combine with `causal_mod()` or `mask=` as needed. The slopes, `alibi_slopes(num_heads)`, are a
    leaf of the mod and get gradients.

    Raises:
        ValueError: num_heads is below 1; on use, a query with another number of heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import alibi_mod
        >>> float(alibi_mod(2)(jnp.float32(1.0), 0, 0, 5, 3))
        0.875
    """
    if num_heads < 1:
        raise ValueError(f"alibi_mod: num_heads must be at least 1; got num_heads={num_heads}.")
    return Alibi(alibi_slopes(num_heads))


def additive_bias_mod(bias: Float[ArrayLike, "..."]) -> ScoreMod:
    """`scores + bias[b, h, q, kv]`, read tile by tile; axes of size 1 are broadcast.

    Args:
        bias: up to 4 axes that broadcast to (batch, num_heads, seq_q, seq_kv); it gets gradients. -inf forbids a pair,
            but saves no work: prefer a mask.

    Raises:
        ValueError: a bias that is not floating or has more axes; on use, a bias that does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import standard_attention
        >>> from attnax.kernels.score_mods import additive_bias_mod
        >>> x = jnp.ones((2, 3, 5, 7))
        >>> standard_attention(x, x, x, score_mod=additive_bias_mod(jnp.ones((3, 1, 5)))).shape
        (2, 3, 5, 7)
    """
    bias = jnp.asarray(bias)
    if bias.ndim > 4 or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            "additive_bias_mod: bias must be floating and broadcast to (batch, num_heads, seq_q, seq_kv); "
            f"got bias.shape={bias.shape}, dtype={bias.dtype}. Pass a boolean array as a mask."
        )
    return AdditiveBias(bias.reshape((1,) * (4 - bias.ndim) + bias.shape))


def soft_cap_mod(cap: float | int | Float[ArrayLike, ""]) -> ScoreMod:
    """`cap * tanh(scores / cap)`: scores stay between -cap and cap.

    Args:
        cap: above 0; an array gets gradients.

    Raises:
        ValueError: a cap that is no number above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import soft_cap_mod
        >>> float(soft_cap_mod(50.0)(jnp.float32(1e4), 0, 0, 0, 0))
        50.0

    References:
        Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024,
        https://arxiv.org/abs/2408.00118.
    """
    if jnp.ndim(cap) != 0 or (is_concrete(cap) and not 0.0 < cap < math.inf):
        raise ValueError(f"soft_cap_mod: cap must be one number above 0; got cap={cap!r}.")
    return SoftCap(cap if isinstance(cap, int | float) else jnp.asarray(cap))


def relative_bucket(
    distance: Int[ArrayLike, "..."] | int,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Int[Array, "..."]:
    """T5's bucket of `distance = kv - q`: half of the buckets hold one distance each, half grow geometrically.

    For n = |distance| and B buckets: n below B/2, else `B/2 + floor(log(n / (B/2)) / log(max_distance / (B/2)) * B/2)`,
    at most B - 1. The bounds are computed in whole numbers and do not depend on a device's logarithm.

    Args:
        distance: of the key from the query, positive for keys after it.
        num_buckets: of both directions together.
        max_distance: from here on all distances share the last bucket.
        bidirectional: keys after the query have the second half of the buckets; otherwise they all share bucket 0 with
            the query itself.

    Raises:
        ValueError: too few buckets (4, or 2 in one direction), or a max_distance that the exact half already covers.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import relative_bucket
        >>> relative_bucket(jnp.array([-200, -9, -3, 0, 3, 9, 200])).tolist()
        [15, 8, 3, 0, 19, 24, 31]

    References:
        C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019,
        https://arxiv.org/abs/1910.10683.
    """
    _check_buckets("relative_bucket", num_buckets, max_distance, bidirectional)
    distance = jnp.asarray(distance, jnp.int32)
    begins = _bucket_begins(num_buckets // 2 if bidirectional else num_buckets, max_distance)
    # Comparisons count the bucket without a table, so that a GPU kernel can compute the bucket.
    reach = abs(distance) if bidirectional else -distance
    bucket = jnp.zeros_like(distance)
    for begin in begins:
        bucket = bucket + (reach >= begin).astype(jnp.int32)
    return bucket + jnp.where(distance > 0, num_buckets // 2, 0) if bidirectional else bucket


def relative_bias_mod(
    table: Float[ArrayLike, "buckets N"], *, max_distance: int = 128, bidirectional: bool = True
) -> ScoreMod:
    """`scores + table[relative_bucket(kv - q), h]`: T5's learned bias by relative position.

    Args:
        table: (num_buckets, num_heads); it gets gradients.
        max_distance: as in `relative_bucket`.
        bidirectional: as in `relative_bucket`; T5 has True in its encoder and False in its decoder.

    Raises:
        ValueError: a table of another shape or dtype, or sizes that `relative_bucket` refuses; on use, a query with
            another number of heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import relative_bias_mod
        >>> table = jnp.outer(jnp.arange(32.0), jnp.array([1.0, 100.0]))  # 32 buckets, 2 heads
        >>> mod = relative_bias_mod(table)
        >>> float(mod(jnp.float32(0.5), 0, 0, 7, 4)), float(mod(jnp.float32(0.5), 0, 1, 4, 7))
        (3.5, 1900.5)
    """
    table = _table("relative_bias_mod", "(num_buckets, num_heads)", table)
    _check_buckets("relative_bias_mod", table.shape[0], max_distance, bidirectional)
    return BucketedBias(table, max_distance, bidirectional)


def relative_table_mod(table: Float[ArrayLike, "N distances"]) -> ScoreMod:
    """`scores + table[h, clip(q - kv, -clip, clip) + clip]`: a learned bias for each head and distance.

    Args:
        table: (num_heads, 2 * clip + 1), from `clip` or more keys after the query to `clip` or more before the query;
            the table gets gradients.

    Raises:
        ValueError: a table of another shape or dtype; on use, a query with another number of heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import relative_table_mod
        >>> mod = relative_table_mod(jnp.array([[-1.0, 0.0, 1.0]]))
        >>> [float(mod(jnp.float32(0.0), 0, 0, 2, kv)) for kv in range(5)]
        [1.0, 1.0, 0.0, -1.0, -1.0]
    """
    table = _table("relative_table_mod", "(num_heads, 2 * clip + 1)", table)
    if table.shape[1] % 2 == 0:
        raise ValueError(
            "relative_table_mod: table must have an odd number of distances, (num_heads, 2 * clip + 1); "
            f"got table.shape={table.shape}."
        )
    return ClippedBias(table)


def causal_mod() -> ScoreMod:
    """-inf where `kv > q`: `attnax.masks.causal()` as a score mod.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import causal_mod
        >>> [float(causal_mod()(jnp.float32(3.0), 0, 0, 1, kv)) for kv in range(3)]
        [3.0, 3.0, -inf]
    """
    return MaskedScoreMod(None, masks.causal())


def sliding_window_mod(window_size: int | Int[ArrayLike, ""], *, causal: bool = True) -> ScoreMod:
    """-inf outside of `0 <= q - kv < window_size`: `attnax.masks.sliding_window` as a score mod.

    Args:
        window_size: in tokens, the query included; at least 1.
        causal: no key after the query; otherwise the window is `|q - kv| < window_size`.

    Raises:
        ValueError: a window that is below 1 or no whole number.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import sliding_window_mod
        >>> [float(sliding_window_mod(2)(jnp.float32(3.0), 0, 0, 2, kv)) for kv in range(4)]
        [-inf, 3.0, 3.0, -inf]
    """
    return MaskedScoreMod(None, masks.sliding_window(window_size, causal=causal))


def prefix_lm_mod(prefix_lengths: Int[ArrayLike, "B"]) -> ScoreMod:
    """-inf where `kv > q` and `kv >= prefix_lengths[b]`: `attnax.masks.prefix` as a score mod.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import prefix_lm_mod
        >>> [float(prefix_lm_mod(jnp.array([2]))(jnp.float32(3.0), 0, 0, 0, kv)) for kv in range(3)]
        [3.0, 3.0, -inf]
    """
    return MaskedScoreMod(None, masks.prefix(prefix_lengths))


def document_mask_mod(document_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"]) -> ScoreMod:
    """-inf where `document_ids[b, q] != document_ids[b, kv]`: `attnax.masks.documents` as a score mod.

    Args:
        document_ids: (length,) or (batch, length), in any order; a negative id is padding, which attends nothing.

    Raises:
        ValueError: ids that are no integers of these shapes; on use, ids of another length than queries and keys.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import document_mask_mod
        >>> mod = document_mask_mod(jnp.array([0, 0, 1]))
        >>> [float(mod(jnp.float32(3.0), 0, 0, 1, kv)) for kv in range(3)]
        [3.0, 3.0, -inf]
    """
    return MaskedScoreMod(None, masks.documents(document_ids))


def mask_mod_to_score_mod(mask_mod: Mask | MaskMod | Bool[ArrayLike, "..."]) -> ScoreMod:
    """-inf where `mask_mod(b, h, q, kv)` is False, for any mask: an object, a function or a boolean array.

    Raises:
        ValueError: an array that is not boolean, or an object that cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.score_mods import mask_mod_to_score_mod
        >>> mod = mask_mod_to_score_mod(lambda b, h, q, kv: abs(q - kv) < 2)
        >>> [float(mod(jnp.float32(3.0), 0, 0, 1, kv)) for kv in range(4)]
        [3.0, 3.0, 3.0, -inf]
    """
    return MaskedScoreMod(None, as_mask(mask_mod))


def mask_mod_to_boolean_mask(
    mask_mod: Mask | MaskMod | Bool[ArrayLike, "..."], *, batch: int, num_heads: int, seq_q: int, seq_kv: int
) -> Bool[Array, "{batch} {num_heads} {seq_q} {seq_kv}"]:
    """`mask_mod(b, h, q, kv)` of every pair, as an array (batch, num_heads, seq_q, seq_kv).

    Raises:
        ValueError: a mask that `mask_mod_to_score_mod` refuses, or arrays that do not fit these sizes.

    Example:
        >>> from attnax.kernels.score_mods import mask_mod_to_boolean_mask
        >>> mask = mask_mod_to_boolean_mask(lambda b, h, q, kv: kv <= q, batch=1, num_heads=1, seq_q=2, seq_kv=3)
        >>> mask[0, 0].tolist()
        [[True, False, False], [True, True, False]]
    """
    score_shape = batch, num_heads, seq_q, seq_kv
    mask = as_mask(mask_mod)
    mask.check("mask_mod_to_boolean_mask", score_shape)
    return jnp.broadcast_to(mask(*index_grid(*score_shape)), score_shape)


def _bucket_begins(count: int, max_distance: int) -> list[int]:
    """The least distance of each of the `count` buckets of one direction, except the first."""
    exact = count // 2
    grown = count - exact

    # Bucket exact + j begins at the least n with log(n / exact) / log(max_distance / exact) * grown >= j, that is with
    # (n / exact) ** grown >= (max_distance / exact) ** j: whole numbers on both sides.
    def begin(j: int) -> int:
        bound = max_distance**j * exact**grown
        return bisect.bisect_left(range(max_distance), True, key=lambda n: n**grown * exact**j >= bound)

    return [*range(1, exact + 1), *(begin(j) for j in range(1, grown))]


def _check_buckets(caller: str, num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    least = 4 if bidirectional else 2
    if num_buckets < least:
        raise ValueError(
            f"{caller}: num_buckets must be at least {least} with bidirectional={bidirectional}; "
            f"got num_buckets={num_buckets}."
        )
    exact = num_buckets // least
    if max_distance <= exact:
        raise ValueError(
            f"{caller}: max_distance must be above the {exact} distances that have a bucket of their own; "
            f"got max_distance={max_distance}, num_buckets={num_buckets}, bidirectional={bidirectional}."
        )


def _table(caller: str, shape: str, table: Any) -> Array:
    table = jnp.asarray(table)
    if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: table must be floating, of shape {shape}; got table.shape={table.shape}, dtype={table.dtype}."
        )
    return table
