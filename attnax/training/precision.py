"""The precision of sums and moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["widen"]


def widen(tree: Any) -> Any:
    """Arrays in float32, or in their own dtype if that is wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
