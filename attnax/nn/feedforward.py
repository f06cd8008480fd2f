"""The position-wise feed-forward of a block, plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from attnax.config import BlockConfig, create_config, resolve_config
from attnax.nn.dropout import Dropout
from attnax.nn.linear import Linear
from attnax.typing import Array, Float

__all__ = ["FeedForward"]

_ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {  # name: (function, gated)
    "gelu": (partial(jax.nn.gelu, approximate=False), False),
    "relu": (jax.nn.relu, False),
    "silu": (jax.nn.silu, False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (partial(jax.nn.gelu, approximate=False), True),
}


class FeedForward(nnx.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)).

    Called as `FeedForward(rngs, config)` or `FeedForward(rngs, d_model, d_ff, dropout_rate, ff_activation)`.

    Args:
        rngs: for the initial weights and the stored dropout stream.
        d_model: width of input and output, or a BlockConfig.
        d_ff: hidden width.
        dropout_rate: probability of dropping hidden activations.
        ff_activation: "gelu" (exact), "relu", "silu", "swiglu", "geglu".
        **fields: other fields of BlockConfig (use_bias, dtype, param_dtype).

    References:
        N. Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        d_model: int | BlockConfig,
        d_ff: int | None = None,
        dropout_rate: float | None = None,
        ff_activation: str | None = None,
        **fields: Any,
    ):
        given = {"d_ff": d_ff, "dropout_rate": dropout_rate, "ff_activation": ff_activation}
        fields.update({name: value for name, value in given.items() if value is not None})
        if isinstance(d_model, BlockConfig):
            config = resolve_config(BlockConfig, d_model, fields)
        else:
            # A layer by itself needs no heads: one head fits any width.
            config = create_config(BlockConfig, num_heads=1, **{"d_model": d_model, "dropout_rate": 0.0, **fields})
        linear = partial(
            Linear, use_bias=config.use_bias, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.activation = config.ff_activation
        self.up = linear(config.d_model, config.d_ff)
        self.gate = nnx.data(linear(config.d_model, config.d_ff) if _ACTIVATIONS[self.activation][1] else None)
        self.down = linear(config.d_ff, config.d_model, scale=config.residual_scale)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*L D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*L D"]:
        """The same function at every position."""
        activation, _ = _ACTIVATIONS[self.activation]
        hidden = activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x)
        return self.down(self.dropout(hidden, deterministic=deterministic, rngs=rngs))
