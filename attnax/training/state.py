"""The state of a training, and what an update says about itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Bool, Float, Int

__all__ = ["DivergenceError", "Evaluation", "Metrics", "TrainState"]


@pytree_dataclass
class TrainState:
    """The state that an update changes.

    Attributes:
        params: the parameters of the model, a dictionary of dictionaries.
        opt_state: of the optimizer.
        update: int32 scalar, number of updates, those that were skipped included. It is the cursor of the data and of
            all random numbers.
        skipped: int32 scalar, number of updates that were skipped because of a non-finite value.
        ema: the exponential moving average of the parameters in float32, with the structure of `params`; () without.
    """

    params: Any
    opt_state: Any
    update: Int[Array, ""]
    skipped: Int[Array, ""]
    ema: Any


class Metrics(NamedTuple):
    """The metrics of an update. None of them is waited for until it is read.

    Attributes:
        loss: float32, the mean loss before the update: the sum of its microbatches over the sum of their weights.
        weight: float32, that sum of weights, such as the number of predicted tokens.
        grad_norm: float32, norm of the gradient of `loss`, before it is clipped.
        is_skipped: whether the update was skipped because of a non-finite value.
        is_finite: whether loss, gradient and the new parameters are finite.
        aux: float32 scalars of the objective, each a mean over the microbatches by their weights.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grad_norm: Float[Array, ""]
    is_skipped: Bool[Array, ""]
    is_finite: Bool[Array, ""]
    aux: dict[str, Float[Array, ""]]


class Evaluation(NamedTuple):
    """The mean loss over batches, without dropout, the sum of their weights, and the means of what `Loss.aux` holds."""

    loss: float
    weight: float
    aux: dict[str, float]


class DivergenceError(ArithmeticError):
    """A loss, a gradient or a parameter is non-finite, and the training cannot go on.

    Attributes:
        is_skippable: whether the update was not made, so that the training can go on without it.
    """

    def __init__(self, message: str, *, is_skippable: bool = False):
        self.is_skippable = is_skippable
        super().__init__(message)
