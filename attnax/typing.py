"""The protocols of attention, and the array types and options of its signatures.

Shapes are written with jaxtyping where it is installed (the tests enforce them through its import hook) and are plain
arrays otherwise, so that kernels need only jax and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Shaped
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Shaped
    except ImportError:
        Array = jax.Array

        class _Plain:
            """`Float[Array, "B T"]` without jaxtyping: just the array type."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Shaped = _Plain

ArrayLike = Array | np.ndarray
Index = Int[ArrayLike, "..."] | int
"""A batch, head, query or key index: integer arrays of any shapes that broadcast with each other."""

__all__ = [
    "Array",
    "ArrayLike",
    "AttentionFn",
    "AttentionFnOptions",
    "AttentionOptions",
    "Bool",
    "Float",
    "Index",
    "Int",
    "MaskMod",
    "ScoreMod",
    "ScoreShape",
    "Shaped",
]


@runtime_checkable
class MaskMod(Protocol):
    """`(b, h, q, kv) -> bool`: whether query `q` may attend key `kv`, in batch row `b` and head `h`.

    Indices are integer arrays of any shapes that broadcast together; True means attend. The result for a pair may
    depend on the indices of that pair and on arrays that the function reads at these indices.
    """

    def __call__(self, b: Index, h: Index, q: Index, kv: Index, /) -> Any: ...


@runtime_checkable
class ScoreMod(Protocol):
    """`(scores, b, h, q, kv) -> scores`: change the scaled float32 scores before the softmax.

    Indices broadcast against `scores`; never use `scores.shape`, the shape of a tile. The result for a pair may
    depend on the score and the indices of that pair, and on arrays that the function reads at these indices. Only
    `standard_attention` takes a function that mixes pairs (a row's maximum, a mean over heads); other kernels refuse
    it. A result of -inf (or of float32's lowest number) counts as masked. Pairs that the mask forbids are evaluated
    too, with a score of 0. Their result does not matter, but keep derivatives with respect to arrays finite
    (`slope * sqrt(abs(q - kv))`, not `sqrt(q - kv)`).
    """

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index, /) -> Array: ...


@runtime_checkable
class AttentionFn(Protocol):
    """The one protocol of attention: `(query, key, value, *, mask, score_mod, ...) -> out`.

    Query `(B, N, T, H)`, key `(B, K, S, H)`, value `(B, K, S, Hv)`, out `(B, N, T, Hv)`; N is a multiple of K
    (grouped-query attention). `mask` is a boolean array that broadcasts to (B, N, T, S), True to attend; a function
    that carries `takes_mask_objects = True` also takes an `attnax.masks.Mask` or a `MaskMod`.
    """

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        /,
        *,
        mask: Any = None,
        score_mod: ScoreMod | None = None,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
    ) -> Any: ...


class AttentionFnOptions(TypedDict, total=False):
    """The keywords of every `AttentionFn`."""

    mask: Any
    score_mod: ScoreMod | None
    dropout_rng: Array | None
    dropout_rate: float
    deterministic: bool


class AttentionOptions(AttentionFnOptions, total=False):
    """The keywords of the built-in softmax kernels, beside `return_lse`."""

    scale: float | Array | None


ScoreShape = tuple[int, int, int | None, int | None]
"""(B, N, T, S); T and S are None if queries and keys are read at positions, which have no limit."""
