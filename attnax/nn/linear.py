"""The linear layer of every projection."""

from __future__ import annotations

from typing import Any

from flax import nnx

from attnax.typing import Array, Float


class Linear(nnx.Linear):
    """`nnx.Linear` over the last axis, computed as one product of two matrices.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        scale: of the initial weights, relative to those that keep the variance (LeCun).
        **options: of `nnx.Linear`.

    With the leading axes merged XLA's CPU backend needs no transposed copy of the activations in the backward pass;
    `benchmarks/layout.py` measures what that saves.
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 1.0, **options: Any):
        kernel_init = nnx.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
        super().__init__(in_features, out_features, kernel_init=kernel_init, **options)

    def __call__(self, x: Float[Array, "*L I"]) -> Float[Array, "*L O"]:  # type: ignore[override]
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)
