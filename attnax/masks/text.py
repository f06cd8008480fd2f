"""Masks and score mods of whole texts: arrays cover all positions of a text, whose rows may be those of prompts."""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from attnax.masks.arguments import MaskedScoreMod, split_score_mod
from attnax.masks.mask import Mask, NoTruth, Range
from attnax.pytrees import function_pytree, is_own, pytree_dataclass
from attnax.typing import Array, Index, ScoreMod, ScoreShape

__all__ = ["OverText", "ScoreModOverText", "has_arrays", "over_text"]


class _RowsOfText:
    """What the mask and the score mod share.

    `check` is that of the place where the text begins: a cache has room for more positions than the text has.
    """

    rows: Array | None

    def row(self, b: Index) -> Index:
        """The row of the arrays for row `b` of the batch."""
        return b if self.rows is None else jnp.asarray(self.rows)[b]

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        """Raises nothing."""


@pytree_dataclass
class OverText(_RowsOfText, Mask):
    """`mask` at positions of a text, whatever the room of a cache; row `b` of the batch reads its row `rows[b]`."""

    mask: Mask
    rows: Array | None  # (B,)

    @property
    def is_opaque(self) -> bool:
        return self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.mask(self.row(b), h, q, kv)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        return self.mask.tile(self.row(b), h, q_range, kv_range)

    def keys_per_query(self, seq_kv: int) -> int | None:
        return self.mask.keys_per_query(seq_kv)


@pytree_dataclass
class ScoreModOverText(_RowsOfText, NoTruth):
    """The same for a score mod."""

    score_mod: ScoreMod  # a pytree
    rows: Array | None  # (B,)

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.score_mod(scores, self.row(b), h, q, kv)


@overload
def over_text(mask_or_mod: Mask, rows: Array | None = None) -> Mask: ...
@overload
def over_text(mask_or_mod: ScoreMod, rows: Array | None = None) -> ScoreMod: ...
def over_text(mask_or_mod: Mask | ScoreMod, rows: Array | None = None) -> Mask | ScoreMod:
    """Reads a mask or score mod at positions of a text; one of Attnax without arrays is returned unchanged.

    Args:
        mask_or_mod: a Mask; any other function counts as a score mod.
        rows: (B,) int32, the row that the mask or mod sees for each row of the batch; None if they are the same.
    """
    sees_rows = rows is not None and not is_own(mask_or_mod)  # a user's function may capture an array
    if isinstance(mask_or_mod, OverText) or not (has_arrays(mask_or_mod) or sees_rows):
        return mask_or_mod
    if isinstance(mask_or_mod, Mask):
        return OverText(mask_or_mod, rows)
    score_mod, mask = split_score_mod(mask_or_mod)
    if score_mod is not None:
        score_mod = ScoreModOverText(function_pytree(score_mod), rows)
    if mask is None:
        assert score_mod is not None
        return score_mod
    return MaskedScoreMod(score_mod, over_text(mask, rows))


def has_arrays(mask_or_mod: Any) -> bool:
    """Whether a mask or score mod holds arrays with axes; numbers, such as the size of a window, are none."""
    return any(np.ndim(leaf) > 0 for leaf in jax.tree.leaves(mask_or_mod))
