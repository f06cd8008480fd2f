"""Models with the parameters of another one and other layers: stacked or not, or only the first ones."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from flax import nnx

from attnax.config import StackConfig
from attnax.nn.stack import Stack

__all__ = ["first_layers", "with_scan_layers"]

Model = TypeVar("Model", bound=nnx.Module)


def with_scan_layers(model: Model, scan_layers: bool) -> Model:
    """A copy of `model` with the same parameters, stacked over the layers or not.

    Args:
        model: any module that holds Stacks, such as a TransformerLM.
        scan_layers: as in StackConfig.

    Raises:
        ValueError: blocks of a user that cannot be stacked, as in `Stack`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.nn import with_scan_layers
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=16)
        >>> with_scan_layers(lm, True)(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
    """
    return _with_layers(model, None, scan_layers=scan_layers)


def first_layers(model: Model, num_layers: int) -> Model:
    """A copy of `model` that ends after its first layers: an early exit, or a draft of the model itself.

    Embeddings, last norm and head are those of the model. The parameters are the same arrays, which take no further
    memory, except for layers that `scan_layers` has stacked: these are copied. Training one of the models leaves the
    other as it is.

    Args:
        model: a module with one Stack, such as a TransformerLM, an encoder or a VisionTransformer.
        num_layers: at least 1, at most those of the model.

    Raises:
        ValueError: num_layers is out of range, or the model has no stack or several.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.nn import first_layers
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=16)
        >>> lm.generate(jnp.zeros((1, 5), int), max_new_tokens=3, draft=first_layers(lm, 1)).tokens.shape
        (1, 3)

    References:
        M. Elhoushi et al., "LayerSkip", 2024, https://arxiv.org/abs/2404.16710.
    """
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    if len(stacks) != 1:
        raise ValueError(
            f"first_layers: the model must have one stack of layers; got {type(model).__name__} with {len(stacks)}. "
            "Give a part that has one, such as model.encoder."
        )
    most = stacks[0].config.num_layers
    if not 1 <= num_layers <= most:
        raise ValueError(
            f"first_layers: num_layers must be at least 1 and at most the {most} of the model; "
            f"got num_layers={num_layers}."
        )
    return _with_layers(model, num_layers, num_layers=num_layers)


def _with_layers(model: Model, count: int | None, **changes: Any) -> Model:
    """A copy of the model with the first `count` layers of each stack, whose configs have the changes."""
    model = nnx.clone(model)
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    stacks = [(module, module._unstacked()[:count]) for module in modules if isinstance(module, Stack)]
    modules += [module for _, layers in stacks for layer in layers for _, module in nnx.iter_modules(layer)]
    for module in modules:
        if isinstance(getattr(module, "config", None), StackConfig):
            module.config = dataclasses.replace(module.config, **changes)
    for stack, layers in stacks:
        stack._hold(layers)
    return model
