"""Score mods: functions `(scores, b, h, q, kv) -> scores` on the scaled float32 scores, before the softmax."""

from __future__ import annotations

from attnax.typing import Array, Index, ScoreMod, function_pytree, pytree_dataclass

__all__ = ["compose_score_mods"]


@pytree_dataclass
class ComposedScoreMod:
    """Applies its mods, each a pytree, from the first to the last."""

    mods: tuple[ScoreMod, ...]

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        for mod in self.mods:
            scores = mod(scores, b, h, q, kv)
        return scores


def compose_score_mods(*mods: ScoreMod | None) -> ScoreMod | None:
    """One score mod that applies `mods` in order, skipping None; None if there is nothing to apply.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import compose_score_mods
        >>> mod = compose_score_mods(lambda s, b, h, q, kv: s + 1.0, None, lambda s, b, h, q, kv: s * 2.0)
        >>> float(mod(jnp.float32(3.0), 0, 0, 0, 0))
        8.0
    """
    present = tuple(mod for mod in mods if mod is not None)
    if len(present) <= 1:
        return present[0] if present else None
    return ComposedScoreMod(tuple(map(function_pytree, present)))
