"""The optimizer of a training run, as a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import optax

__all__ = ["OptimizerConfig", "in_float32"]

Algorithm = Literal["adamw", "lion", "adafactor", "muon"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
MomentDtype = Literal["float32", "bfloat16"]

_CHOICES = {"algorithm": Algorithm, "schedule": Schedule, "moment_dtype": MomentDtype}
_LIMITS: dict[tuple[str, ...], tuple[str, Callable[[float], bool]]] = {  # in words and as a test
    ("steps", "batch_size", "accumulate"): ("at least 1", lambda x: x >= 1),
    ("learning_rate", "max_grad_norm"): ("above 0 and finite", lambda x: 0 < x < math.inf),
    ("final_learning_rate",): ("between 0 and 1", lambda x: 0 <= x <= 1),
    ("warmup",): ("at least 0 and below 1", lambda x: 0 <= x < 1),
    ("decay",): ("above 0 and at most 1", lambda x: 0 < x <= 1),
    ("weight_decay",): ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    ("beta2",): ("between 0 and 1", lambda x: 0 < x < 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An algorithm, a schedule of its learning rate with a linear warm-up, and the size of an update.

    "adamw" suits everything. "muon" makes the update of a layer's matrix nearly orthogonal: it takes fewer steps to the
    same loss, and the products of each update take time, little in a step of many tokens; embeddings and other tables,
    routers, the head, norms and biases have AdamW. "lion" takes the sign of a moment; it keeps one moment in place of
    two, and wants a learning rate 3 to 10 times smaller, and as many times the weight decay. "adafactor" keeps a
    number for each row and column of a matrix in place of moments, and no first moment. Updates of "muon" and
    "adafactor" have the size of AdamW's or less, so that its learning rate and weight decay suit them.

    Matrices have weight decay. Vectors (norms, biases, learned tokens) have none, also where a scanned stack holds
    those of all layers in one array.

    Attributes:
        algorithm: "adamw", "lion", "adafactor" or "muon".
        schedule: of the learning rate after the warm-up: "cosine" and "linear" fall to the last one, "constant" stays,
            "wsd" (warm-up, stable, decay) stays and falls linearly at the end.
        steps: number of updates of the parameters.
        batch_size: number of sequences in a forward pass.
        accumulate: number of forward passes whose gradients are added up to one update.
        learning_rate: the highest learning rate.
        final_learning_rate: the last learning rate, as a fraction of the highest.
        warmup: fraction of the steps over which the learning rate rises from 0.
        decay: of "wsd", the fraction of the steps over which the learning rate falls at the end.
        weight_decay: of matrices.
        beta2: decay of the second moment; of lion, of its moment.
        max_grad_norm: gradients of a larger norm are scaled down to this norm.
        moment_dtype: of first moments, "float32" or "bfloat16"; second moments are float32. Float32 is float64 for
            parameters of float64.

    References:
        X. Chen et al., "Symbolic Discovery of Optimization Algorithms" (Lion), 2023, https://arxiv.org/abs/2302.06675.
        N. Shazeer and M. Stern, "Adafactor", 2018, https://arxiv.org/abs/1804.04235.
        X. Zhai et al., "Scaling Vision Transformers", 2021, https://arxiv.org/abs/2106.04560 (Adafactor with the
        learning rate of Adam).
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/.
        J. Liu et al., "Muon is scalable for LLM training", 2025, https://arxiv.org/abs/2502.16982 (size of updates).
        S. Hu et al., "MiniCPM", 2024, https://arxiv.org/abs/2404.06395 (wsd).
    """

    algorithm: Algorithm = "adamw"
    schedule: Schedule = "cosine"
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.1
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.1
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    moment_dtype: MomentDtype = "float32"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            known, value = get_args(choices), getattr(self, name)
            if value not in known:
                words = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise ValueError(f"OptimizerConfig: {name} must be {words}; got {name}={value!r}.")
        for names, (rule, holds) in _LIMITS.items():
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"OptimizerConfig: {name} must be {rule}; got {name}={getattr(self, name)!r}.")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                "OptimizerConfig: warmup and decay of wsd are parts of the steps, together at most 1; got "
                f"warmup={self.warmup}, decay={self.decay}."
            )
        if self.algorithm == "adafactor" and self.moment_dtype != "float32":
            raise ValueError(
                "OptimizerConfig: moment_dtype is that of first moments, and adafactor keeps none; got "
                f"moment_dtype={self.moment_dtype!r}. Leave it out."
            )

    def build_schedule(self) -> optax.Schedule:
        """The learning rate of each update, by the number of updates before it that were not skipped."""
        import optax

        peak, last = self.learning_rate, self.learning_rate * self.final_learning_rate
        warmup = int(self.warmup * self.steps)
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(
                init_value=0.0, peak_value=peak, warmup_steps=warmup, decay_steps=self.steps, end_value=last
            )
        begin = {"linear": warmup, "constant": self.steps, "wsd": self.steps - int(self.decay * self.steps)}
        falls = optax.constant_schedule(peak)
        if self.schedule != "constant":
            falls = optax.linear_schedule(peak, last, max(1, self.steps - begin[self.schedule]))
        rises = optax.linear_schedule(0.0, peak, max(1, warmup)) if warmup else optax.constant_schedule(peak)
        stays = optax.constant_schedule(peak)
        return optax.join_schedules([rises, stays, falls], [warmup, begin[self.schedule]])

    def build(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer; each call of its `update` is an update with the gradients that `Trainer` added up.

        Its moments are in float32 or wider, whatever the dtype of the parameters; `moment_dtype` says otherwise.
        """
        import optax

        return in_float32(optax.chain(optax.clip_by_global_norm(self.max_grad_norm), self._algorithm()))

    def _algorithm(self) -> optax.GradientTransformation:
        import optax
        from optax import contrib

        rate, decay = self.build_schedule(), {"weight_decay": self.weight_decay, "mask": _of_each(_decays)}
        first = "bfloat16" if self.moment_dtype == "bfloat16" else None
        if self.algorithm == "lion":
            return optax.lion(rate, b2=self.beta2, mu_dtype=first, **decay)
        if self.algorithm == "adafactor":  # optax.adafactor decays weights without the learning rate
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.stateless(lambda updates, _: _of_each(_clip_rms)(updates)),
                optax.add_decayed_weights(**decay),
                optax.scale_by_learning_rate(rate),
            )
        adamw = optax.adamw(rate, b2=self.beta2, mu_dtype=first, **decay)
        if self.algorithm == "adamw":
            return adamw
        axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)  # further axes: layers, experts
        muon = contrib.muon(
            rate,
            mu_dtype=first,
            weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=_of_each(lambda *leaf: axes),
            consistent_rms=_UPDATE_OF_ADAM,
        )
        labels = _of_each(lambda *leaf: "muon" if _is_hidden(*leaf) else "adamw")
        return optax.partition({"muon": muon, "adamw": adamw}, labels)


_UPDATE_OF_ADAM = 0.2  # its usual root mean square, as a share of the learning rate (Liu et al.)


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with moments in float32 or wider, since Adam's epsilon is 0 in float16."""
    import optax

    from attnax.training.precision import widen

    extended = optax.with_extra_args_support(optimizer)

    def update(gradients: Any, state: Any, params: Any = None, **more: Any) -> Any:
        return extended.update(widen(gradients), state, None if params is None else widen(params), **more)

    return optax.GradientTransformationExtraArgs(lambda params: extended.init(widen(params)), update)


def _of_each(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """The function of a tree that applies `function(path, leaf)` to each leaf."""
    import jax

    return lambda tree: jax.tree_util.tree_map_with_path(function, tree)


def _clip_rms(path: tuple[Any, ...], update: Any) -> Any:
    """An update of root mean square 1 at most, of each layer for itself, as Adafactor clips it."""
    import jax.numpy as jnp

    axes = tuple(range(_is_stacked(path), update.ndim))
    return update / jnp.maximum(1.0, jnp.sqrt(jnp.square(update).mean(axes, keepdims=True)))


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(key.key) for key in path if hasattr(key, "key")]


def _is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the first axis of a parameter is one of layers, in a scanned stack."""
    return "periods" in _names(path)


def _is_hidden(path: tuple[Any, ...], parameter: Any) -> bool:
    """Whether a parameter is a matrix between hidden states: not a table, a router, a head or patches of images."""
    others = {"embed", "embedding", "patches", "relative_bias", "router", "head"}
    return _decays(path, parameter) and not others & set(_names(path))


def _decays(path: tuple[Any, ...], parameter: Any) -> bool:
    """Whether a parameter has weight decay: matrices have decay; norms, biases, sinks and learned tokens do not.

    Vectors that a scanned stack holds in one array are vectors. A mixture may hold many norms or biases in one array of
    more axes, also without decay.
    """
    name = next(reversed(_names(path)), "")
    vectors = ("bias", "scale", "sinks", "class_token", "registers")
    return parameter.ndim - _is_stacked(path) > 1 and not any(word in name for word in vectors)
