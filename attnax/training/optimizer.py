"""The optimizer of a training run, as a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from attnax.typing import Array

if TYPE_CHECKING:
    import optax

__all__ = ["OptimizerConfig"]

Algorithm = Literal["adamw", "muon"]

_LIMITS: dict[tuple[str, ...], tuple[str, Callable[[float], bool]]] = {  # in words and as a test
    ("steps", "batch_size", "accumulate"): ("at least 1", lambda x: x >= 1),
    ("learning_rate", "max_grad_norm"): ("above 0 and finite", lambda x: 0 < x < math.inf),
    ("final_learning_rate",): ("between 0 and 1", lambda x: 0 <= x <= 1),
    ("warmup",): ("at least 0 and below 1", lambda x: 0 <= x < 1),
    ("weight_decay", "load_balance_loss", "router_z_loss"): ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    ("beta2",): ("between 0 and 1", lambda x: 0 < x < 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices of the layers, with linear warm-up and cosine decay.

    Muon makes the update of a matrix nearly orthogonal. It takes fewer steps to the same loss, and the products of each
    update take time: little in a step of many tokens. Its updates have the size of AdamW's, so that learning rate and
    weight decay suit both. Embeddings and other tables, routers, the head, norms and biases have AdamW.

    Attributes:
        algorithm: "adamw" or "muon".
        steps: number of updates of the parameters.
        batch_size: number of sequences in a forward pass.
        accumulate: number of forward passes whose gradients are averaged into one update.
        learning_rate: the highest learning rate.
        final_learning_rate: the last learning rate, as a fraction of the highest.
        warmup: fraction of the steps over which the learning rate rises from 0.
        weight_decay: of matrices; vectors (norms, biases) have no decay.
        beta2: decay of the second moment.
        max_grad_norm: gradients of a larger norm are scaled down to this norm.
        load_balance_loss: weight of the mixtures' load-balance losses, summed over the layers, in the loss.
        router_z_loss: weight of the mixtures' router z-losses, summed over the layers, in the loss.

    References:
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/.
        J. Liu et al., "Muon is scalable for LLM training", 2025, https://arxiv.org/abs/2502.16982 (size of updates).
    """

    algorithm: Algorithm = "adamw"
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.1
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    load_balance_loss: float = 0.01
    router_z_loss: float = 0.001

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            known = " or ".join(map(repr, get_args(Algorithm)))
            raise ValueError(f"OptimizerConfig: algorithm must be {known}; got algorithm={self.algorithm!r}.")
        for names, (rule, holds) in _LIMITS.items():
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"OptimizerConfig: {name} must be {rule}; got {name}={getattr(self, name)!r}.")

    def schedule(self) -> optax.Schedule:
        """The learning rate of each update."""
        import optax

        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=int(self.warmup * self.steps),
            decay_steps=self.steps,
            end_value=self.learning_rate * self.final_learning_rate,
        )

    def weigh(self, aux: dict[str, Any]) -> Array | float:
        """The sum of the losses of a model's layers, which is added to the loss; 0 if there are none.

        The losses are the entries of `aux` whose names end in "_loss". Those of mixtures have the weights of this
        config; one of a user's block has the weight 1.

        Raises:
            ValueError: such an entry is no floating scalar.
        """
        import jax.numpy as jnp

        weights = {"load_balance_loss": self.load_balance_loss, "router_z_loss": self.router_z_loss}
        losses = {name: value for name, value in aux.items() if name.endswith("_loss")}
        for name, value in losses.items():
            shape, dtype = jnp.shape(value), jnp.result_type(value)
            if shape != () or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    "OptimizerConfig: an entry of Output.aux whose name ends in _loss is added to the loss, so it must "
                    f"be a floating scalar; got {name} of {dtype}{list(shape)}. Take its mean, or another name."
                )
        return sum((weights.get(name, 1.0) * value for name, value in losses.items()), 0.0)

    def num_moments(self, path: tuple[Any, ...], parameter: Any) -> int:
        """The number of float32 arrays of a parameter's shape that the optimizer keeps: Muon has one of a matrix.

        Args:
            path: of the parameter, of entries with a `key`.
            parameter: an array or its shape.
        """
        return 1 if self.algorithm == "muon" and _is_hidden(path, parameter) else 2

    def build(self) -> optax.GradientTransformation:
        """The optimizer; each call of its `update` is an update with the gradients that `Trainer` accumulated."""
        import jax
        import optax
        from optax import contrib

        def of_each(function: Callable[..., Any]) -> Callable[[Any], Any]:
            return lambda params: jax.tree_util.tree_map_with_path(function, params)

        decay = self.weight_decay
        update = optax.adamw(self.schedule(), b2=self.beta2, weight_decay=decay, mask=of_each(_decays))
        if self.algorithm == "muon":
            axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)  # further axes: layers, experts
            muon = contrib.muon(
                self.schedule(),
                weight_decay=decay,
                muon_weight_dimension_numbers=of_each(lambda *leaf: axes),
                consistent_rms=_UPDATE_OF_ADAM,
            )
            labels = of_each(lambda *leaf: "muon" if _is_hidden(*leaf) else "adamw")
            update = optax.partition({"muon": muon, "adamw": update}, labels)
        return _in_float32(optax.chain(optax.clip_by_global_norm(self.max_grad_norm), update))


_UPDATE_OF_ADAM = 0.2  # its usual root mean square, as a share of the learning rate (Liu et al.)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with moments in float32 or wider, since Adam's epsilon is 0 in float16."""
    import jax
    import jax.numpy as jnp
    import optax

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        return optimizer.update(widen(gradients), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda params: optimizer.init(widen(params)), update)


def _is_hidden(path: tuple[Any, ...], parameter: Any) -> bool:
    """Whether a parameter is a matrix between hidden states: not a table, a router or the head."""
    names = {str(key.key) for key in path if hasattr(key, "key")}
    return _decays(path, parameter) and not names & {"embed", "embedding", "relative_bias", "router", "head"}


def _decays(path: tuple[Any, ...], parameter: Any) -> bool:
    """Whether a parameter has weight decay: matrices have decay; norms, biases and sinks do not.

    Vectors that a scanned stack holds in one array are vectors. A mixture may hold many norms or biases in one array of
    more axes, also without decay.
    """
    names = {str(key.key) for key in path if hasattr(key, "key")}
    name = next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "")
    return parameter.ndim - ("periods" in names) > 1 and not any(word in name for word in ("bias", "scale", "sinks"))
