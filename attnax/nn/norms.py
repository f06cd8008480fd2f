"""Normalisation of the residual stream, statistics in float32."""

from __future__ import annotations

from typing import Any

from flax import nnx

from attnax.config import BlockConfig, NormKind

__all__ = ["RMSNorm", "create_norm", "norm_of"]

RMSNorm = nnx.RMSNorm


def create_norm(
    norm_type: NormKind,
    d_model: int,
    rngs: nnx.Rngs,
    *,
    epsilon: float = 1e-6,
    use_bias: bool = True,
    dtype: Any = None,
    param_dtype: Any = "float32",
) -> nnx.Module:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last axis of width d_model.

    Raises:
        ValueError: another norm_type.
    """
    if norm_type == "rms":
        return nnx.RMSNorm(d_model, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    if norm_type == "layer":
        return nnx.LayerNorm(
            d_model,
            epsilon=epsilon,
            use_bias=use_bias,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels when the mean is large
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
    raise ValueError(f"create_norm: norm_type must be 'layer' or 'rms'; got norm_type={norm_type!r}.")


def norm_of(config: BlockConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of the residual stream that a config names."""
    return create_norm(
        config.norm_type,
        config.d_model,
        rngs,
        epsilon=config.norm_eps,
        use_bias=config.has_bias("norm"),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )
