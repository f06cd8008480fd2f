"""A module as a function of its parameters, and the loss that an objective gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.config import EncoderDecoderConfig, TransformerConfig, VisionTransformerConfig
from attnax.models import Transformer, TransformerLM, VisionTransformer
from attnax.training.objectives import Batch, Loss, Objective
from attnax.typing import Array

__all__ = ["FunctionalModel", "ModelSource"]

ModelSource = TransformerConfig | EncoderDecoderConfig | VisionTransformerConfig | Callable[[nnx.Rngs], nnx.Module]
"""A config of `TransformerLM`, `Transformer` or `VisionTransformer`, or a function that makes any module."""

_MODELS: dict[type, Callable[..., nnx.Module]] = {
    TransformerConfig: TransformerLM,
    EncoderDecoderConfig: Transformer,
    VisionTransformerConfig: VisionTransformer,
}


class FunctionalModel:
    """The structure of a module, the shapes of its parameters, and its other variables, which stay as they are.

    Args:
        source: of the module.
        seed: of its parameters and random streams.

    Attributes:
        abstract: the module with shapes in place of arrays.
        config: of the library, or None for any other module.
        params: an `nnx.State` of the shapes of the parameters.
    """

    def __init__(self, source: ModelSource, seed: int):
        make = _maker(source)
        self._make = lambda: make(nnx.Rngs(seed, params=seed, dropout=seed))  # dropout does not change parameters
        self.abstract = nnx.eval_shape(self._make)
        config = getattr(self.abstract, "config", None)
        self.config: Any = config if type(config) in _MODELS else None
        self._graphdef, self.params, rest = _split(self.abstract)
        self._rest = jax.jit(lambda: _split(self._make())[2])() if jax.tree.leaves(rest) else rest

    def init(self) -> Any:
        """The initial parameters, a dictionary of dictionaries."""
        return nnx.to_pure_dict(_split(self._make())[1])

    def merge(self, params: Any) -> Any:
        """The module with these parameters."""
        rest = jax.tree.map(lambda leaf: leaf, self._rest)  # variables of the module's own
        return nnx.merge(self._graphdef, params, rest)

    def loss(self, objective: Objective, params: Any, batch: Batch, key: Array | None) -> Loss:
        """The loss of a batch, with dropout and other draws from `key`, or without any.

        Raises:
            ValueError: the module writes into variables that are no parameters, or the objective returns no `Loss`.
        """
        model, rngs = self.merge(params), None
        if key is None:
            model.eval()
        else:
            model.train()
            rngs = nnx.Rngs(key)
            _seed(model, rngs)
        before = _other_variables(model)
        loss = objective(model, batch, rngs)
        written = [path for path, value in _other_variables(model).items() if before.get(path) is not value]
        if written:
            raise ValueError(
                "Trainer: a step keeps parameters alone, so that what a block writes into other variables would be "
                f"lost; got a change of {'.'.join(map(str, written[0]))}. Pass state on in the carry or in aux, draw "
                "from the rngs of run, or train in a loop of your own."
            )
        if not isinstance(loss, Loss) or jnp.shape(loss.sum) or jnp.shape(loss.weight):
            raise ValueError(f"Trainer: an objective must return a Loss of two scalars and aux; got {loss!r}.")
        return jax.tree.map(jnp.asarray, loss)


def _split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The structure, the parameters and the other variables."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, params, rest[0]


def _maker(source: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    if type(source) in _MODELS:
        return partial(_MODELS[type(source)], config=source)
    if isinstance(source, nnx.Module) or not callable(source):
        raise ValueError(
            "Trainer: model must be a config of TransformerLM, Transformer or VisionTransformer, or a function of "
            f"nnx.Rngs that makes a module; got {type(source).__name__}."
        )
    make: Callable[[nnx.Rngs], nnx.Module] = source
    return make


def _seed(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Gives the random streams that a module stores new keys, so that a step repeats none and stores none."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.RngKey)):
        variable[...] = jax.random.split(rngs(), variable.shape) if variable.shape else rngs()


def _other_variables(model: nnx.Module) -> dict[Any, Any]:
    """The values of a module's variables, without those that nobody expects to be kept.

    These are parameters, streams of random numbers, which `_seed` seeds, and `sow`n intermediates.
    """
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate))))
    return {path: variable.get_raw_value() for path, variable in state}
