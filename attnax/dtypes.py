"""The dtype that computations on low-precision arrays use."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__all__ = ["wide_dtype"]


def wide_dtype(dtype: Any) -> Any:
    """The dtype of scores and sums: float32, or the floating dtype itself if it has more bits."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)
