"""Dropout that is off until asked for, and that says so when it has no randomness."""

from __future__ import annotations

from flax import nnx

from attnax.typing import Array, Float


class Dropout(nnx.Dropout):
    """`nnx.Dropout` with the house rules: initially deterministic, explicit `rngs` beat stored ones.

    Args:
        rate: probability of dropping an element.
        rngs: a fork of its `dropout` stream is stored, if the rate is above 0.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs | None = None):
        super().__init__(rate, deterministic=True, rngs=rngs if rate > 0.0 else None)

    def key(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> Array | None:
        """A fresh key, or None where dropout is off.

        Raises:
            ValueError: dropout is on and there are neither explicit nor stored rngs.
        """
        if self.rate == 0.0 or (self.deterministic if deterministic is None else deterministic):
            return None
        if rngs is not None:
            if "dropout" not in rngs and "default" not in rngs:
                raise ValueError("Dropout: rngs must have a `dropout` stream; pass rngs=nnx.Rngs(dropout=seed).")
            return rngs.dropout()
        if self.rngs is None:
            raise ValueError(
                f"Dropout: dropout needs randomness; got dropout_rate={self.rate}, deterministic=False, rngs=None. "
                "Pass rngs=nnx.Rngs(seed) to the call, or deterministic=True."
            )
        return self.rngs()

    def __call__(  # type: ignore[override]  # one rngs type instead of three
        self, x: Float[Array, ...], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, ...]:
        """X with elements dropped and the rest scaled by 1 / (1 - rate), or x itself where dropout is off."""
        key = self.key(deterministic, rngs)
        return x if key is None else super().__call__(x, deterministic=False, rngs=key)
