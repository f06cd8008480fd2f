"""Normalisation of the residual stream, statistics in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.checks import wide_dtype
from attnax.config import BlockConfig, NormKind
from attnax.typing import Array, Float

__all__ = ["LayerNorm", "OffsetRMSNorm", "RMSNorm", "create_norm", "norm_of", "rms_norm_of"]


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` that also works with strict dtype promotion: Flax mixes the dtypes of x and its statistics."""

    def __call__(self, x: Float[Array, "*L D"], mask: Array | None = None) -> Float[Array, "*L D"]:
        """The normalised features."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask=mask)


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` that also works with strict dtype promotion."""

    def __call__(self, x: Float[Array, "*L D"], mask: Array | None = None) -> Float[Array, "*L D"]:
        """The normalised features."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask=mask)


class OffsetRMSNorm(nnx.Module):
    """RMSNorm(x) * (offset + scale), as in Gemma; computed in float32, returned in `dtype`.

    Args:
        num_features: width of the last axis.
        offset: added to the scale, which starts at 1 - offset, since a narrow dtype has more digits near 0.
        rngs: as in RMSNorm.
        epsilon: added to the mean of the squares.
        dtype: of the result.
        param_dtype: of the scale.
    """

    def __init__(
        self,
        num_features: int,
        *,
        offset: float,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        dtype: Any = "float32",
        param_dtype: Any = "float32",
    ):
        self.num_features, self.offset, self.dtype = num_features, offset, dtype
        wide = wide_dtype(dtype)
        self.norm = RMSNorm(num_features, epsilon=epsilon, dtype=wide, use_scale=False, rngs=rngs)
        self.scale = nnx.Param(jnp.full((num_features,), 1.0 - offset, param_dtype))

    def __call__(self, x: Float[Array, "*L D"]) -> Float[Array, "*L D"]:
        """The normalised features."""
        normalised = self.norm(x)
        scale = self.offset + self.scale[...].astype(normalised.dtype)
        return (normalised * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


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
        ValueError: an unknown norm_type.
    """
    if norm_type == "rms":
        return RMSNorm(d_model, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    if norm_type == "layer":
        return LayerNorm(
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
    """The norm that a config names, for the residual stream."""
    if config.norm_type == "rms":
        return rms_norm_of(config, config.d_model, rngs)
    return create_norm(
        config.norm_type,
        config.d_model,
        rngs,
        epsilon=config.norm_eps,
        use_bias=config.has_bias("norm"),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )


def rms_norm_of(config: BlockConfig, num_features: int, rngs: nnx.Rngs) -> nnx.Module:
    """The RMSNorm that a config describes, for the stream or for heads."""
    fields: dict[str, Any] = {"epsilon": config.norm_eps, "dtype": config.dtype, "param_dtype": config.param_dtype}
    if config.norm_offset:
        return OffsetRMSNorm(num_features, offset=config.norm_offset, rngs=rngs, **fields)
    return RMSNorm(num_features, rngs=rngs, **fields)
