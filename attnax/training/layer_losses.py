"""The losses of a model's layers, which are added to the loss of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from attnax.typing import Array

__all__ = ["LOSS_WEIGHTS", "check_loss_weights", "sum_of_layer_losses"]

LOSS_WEIGHTS: Mapping[str, float] = {"load_balance_loss": 0.01, "router_z_loss": 0.001}
"""The weights of the losses of mixtures, each summed over the layers; any other loss of a layer has the weight 1."""


def sum_of_layer_losses(caller: str, aux: Mapping[str, Any], loss_weights: Mapping[str, float]) -> Array | float:
    """The weighted sum of the entries of `Output.aux` whose names end in "_loss"; 0 if there are none.

    Args:
        caller: for messages.
        aux: of a model.
        loss_weights: by name; 1 for one that it does not name.

    Raises:
        ValueError: such an entry is no floating scalar.
    """
    losses = {name: value for name, value in aux.items() if name.endswith("_loss")}
    for name, value in losses.items():
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{caller}: an entry of Output.aux whose name ends in _loss is added to the loss, so it must be a "
                f"floating scalar; got {name} of {dtype}{list(shape)}. Take its mean, or another name."
            )
    return sum((loss_weights.get(name, 1.0) * value for name, value in losses.items()), 0.0)


def check_loss_weights(caller: str, loss_weights: Mapping[str, float]) -> None:
    """Raises ValueError for a weight out of range, or of something else than a loss."""
    for name, weight in loss_weights.items():
        if not (name.endswith("_loss") and 0 <= weight < math.inf):
            raise ValueError(
                f"{caller}: loss_weights are of losses, whose names end in _loss, and at least 0 and finite; got "
                f"{name}={weight!r}."
            )
