"""Dropout and jitter: off by default, and a ValueError where they are on without randomness."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import nnx

from attnax.typing import Array, Float


class Dropout(nnx.Dropout):
    """`nnx.Dropout` that starts deterministic and prefers the `rngs` of a call to the stored ones.

    Args:
        rate: probability of dropping an element.
        rngs: if they have a `dropout` stream and the rate is above 0, a fork of the stream is stored.
    """

    field: ClassVar[str] = "dropout_rate"  # of BlockConfig, for messages

    def __init__(self, rate: float, *, rngs: nnx.Rngs | None = None):
        stored = rate > 0.0 and rngs is not None and ("dropout" in rngs or "default" in rngs)
        super().__init__(rate, deterministic=True, rngs=rngs if stored else None)

    def key(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> Array | None:
        """A fresh key, or None where dropout is off.

        Raises:
            ValueError: dropout is on without rngs, given or stored.
        """
        if self.rate == 0.0 or (self.deterministic if deterministic is None else deterministic):
            return None
        name = type(self).__name__
        if rngs is not None:
            if "dropout" not in rngs and "default" not in rngs:
                raise ValueError(f"{name}: rngs must have a `dropout` stream; pass rngs=nnx.Rngs(dropout=seed).")
            return rngs.dropout()
        if self.rngs is None:
            raise ValueError(
                f"{name}: {name.lower()} needs randomness; got {self.field}={self.rate}, deterministic=False, "
                "rngs=None. Pass rngs=nnx.Rngs(seed) to the call, or deterministic=True."
            )
        return self.rngs()

    def __call__(  # type: ignore[override]  # one rngs type instead of three
        self, x: Float[Array, "..."], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "..."]:
        """x with elements dropped and the rest scaled by 1 / (1 - rate); x itself if dropout is off."""
        key = self.key(deterministic, rngs)
        return x if key is None else super().__call__(x, deterministic=False, rngs=key)


class Jitter(Dropout):
    """Multiplies each element by a uniform random number; mode and randomness are as in Dropout.

    Args:
        rate: the uniform numbers lie within 1 +- rate.
        rngs: as in Dropout.
    """

    field: ClassVar[str] = "router_jitter"

    def __call__(  # type: ignore[override]  # one rngs type instead of three
        self, x: Float[Array, "..."], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "..."]:
        """x with its elements jittered; x itself if jitter is off."""
        key = self.key(deterministic, rngs)
        if key is None:
            return x
        return x * jax.random.uniform(key, x.shape, x.dtype, 1.0 - self.rate, 1.0 + self.rate)
