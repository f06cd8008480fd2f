"""The position-wise feed-forward of a block, plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.config import BlockConfig, resolve_config
from attnax.nn.dropout import Dropout
from attnax.nn.linear import Linear
from attnax.sharding import constrain, stream_axes
from attnax.typing import Array, Float

__all__ = ["ACTIVATIONS", "FeedForward", "activate"]

_gelu, _gelu_tanh = partial(jax.nn.gelu, approximate=False), partial(jax.nn.gelu, approximate=True)


def _clipped_silu(x: Array) -> Array:
    x = jnp.minimum(x, 7.0)
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {  # name: (function, gated)
    "gelu": (_gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (jax.nn.relu, False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),
    "silu": (jax.nn.silu, False),
    "swish": (jax.nn.silu, False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (_gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
    "reglu": (jax.nn.relu, True),
    "swiglu_clipped": (_clipped_silu, True),
}
"""The function that each `ff_activation` names, and whether it is gated."""


def activate(name: str, up: Array, gate: Array | None) -> Array:
    """The activation `name` of the projections: act(up), or act(gate) * up where there is a gate."""
    activation, _ = ACTIVATIONS[name]
    if gate is None:
        return activation(up)
    if name == "swiglu_clipped":
        up = jnp.clip(up, -7.0, 7.0) + 1.0
    return activation(gate) * up


class FeedForward(nnx.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)).

    Called as `FeedForward(rngs, config)` or `FeedForward(rngs, d_model, d_ff, dropout_rate, ff_activation)`.

    Args:
        rngs: for the initial weights and the stored dropout stream.
        d_model: width of input and output, or a BlockConfig.
        d_ff: hidden width.
        dropout_rate: probability of dropping hidden activations.
        ff_activation: as in BlockConfig; gated activations have a third matrix.
        **fields: other fields of BlockConfig (use_bias, dtype, param_dtype).

    The gated "swiglu_clipped" of gpt-oss is min(gate, 7) sigmoid(1.702 min(gate, 7)) (clip(up, -7, 7) + 1).

    References:
        N. Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        d_model: int | BlockConfig = BlockConfig.d_model,
        d_ff: int | None = None,
        dropout_rate: float | None = None,
        ff_activation: str | None = None,
        **fields: Any,
    ):
        d_model = fields.pop("config", d_model)
        given = {"d_ff": d_ff, "dropout_rate": dropout_rate, "ff_activation": ff_activation}
        fields.update({name: value for name, value in given.items() if value is not None})
        if isinstance(d_model, BlockConfig):
            config = resolve_config(BlockConfig, d_model, fields)
        else:
            # A layer alone needs no heads: one head fits any width.
            config = BlockConfig(num_heads=1, **{"d_model": d_model, "dropout_rate": 0.0, **fields})
        linear = partial(Linear, rngs, config, bias="feed_forward")
        self.activation = config.ff_activation
        up, down = (("embed", "hidden"), ("hidden", "embed"))
        self.up = linear(config.d_model, config.d_ff, axes=up)
        self.gate = nnx.data(linear(config.d_model, config.d_ff, axes=up) if ACTIVATIONS[self.activation][1] else None)
        self.down = linear(config.d_ff, config.d_model, axes=down, scale=config.residual_init_scale)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)

    @jax.named_scope("feed_forward")
    def __call__(
        self, x: Float[Array, "*L D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*L D"]:
        """The same function at every position."""
        hidden = activate(self.activation, self.up(x), None if self.gate is None else self.gate(x))
        hidden = constrain(hidden, *stream_axes(hidden.ndim, "hidden"))
        return self.down(self.dropout(hidden, deterministic=deterministic, rngs=rngs))
