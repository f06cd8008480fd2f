"""From logits to the next token: penalties on tokens of the text, cuts to likely tokens, and the draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.checks import check_shape, is_concrete
from attnax.generation.text import Text
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Float, Int

__all__ = ["CUTS", "Sampler"]


@pytree_dataclass
class Sampler:
    """Draws a token from softmax(logits / temperature), after penalties, among the likeliest tokens.

    Penalties come first, then the temperature, then top_k, top_p and min_p, applied in this order; None leaves a step
    out. The numbers are leaves of a pytree, so new values compile nothing. Only temperature 0, greedy decoding,
    is a program of its own.

    Attributes:
        temperature: 0 or None takes the likeliest token; 1 samples the model's own distribution.
        top_k: keep the k likeliest tokens, and tokens that tie with the last of them.
        top_p: keep the fewest likeliest tokens whose probabilities sum to p (nucleus sampling).
        min_p: keep the tokens that are at least min_p times as likely as the likeliest.
        logit_bias: added to the logits: an array (vocab_size,), or a mapping of token ids to numbers.
        repetition_penalty: divides positive logits of tokens in the text, prompt included, and multiplies negative
            ones.
        presence_penalty: subtracted from the logits of written tokens.
        frequency_penalty: subtracted once for each time a token was written.
        no_repeat_ngram: no sequence of that many tokens occurs twice in the text, prompt included. Where this rule, or
            a logits_fn, forbids every token, token 0 follows.
        logits_fn: a user's `(logits, text) -> logits` of float32 (rows, vocab_size) and a `Text`, after the penalties
            and before the cuts. The length of a text is in `lengths`, not in shapes. A function that holds arrays
            should be a callable pytree; a new lambda is compiled anew.

    Raises:
        ValueError: a number out of range.

    References:
        A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, https://arxiv.org/abs/1904.09751.
        N. Keskar et al., "CTRL", 2019, https://arxiv.org/abs/1909.05858, section 4.1 (repetition).
        M. Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, https://arxiv.org/abs/2407.01082.
    """

    temperature: float | Array | None = 0.0
    top_k: int | Array | None = None
    top_p: float | Array | None = None
    min_p: float | Array | None = None
    logit_bias: Any = None
    repetition_penalty: float | Array | None = None
    presence_penalty: float | Array | None = None
    frequency_penalty: float | Array | None = None
    no_repeat_ngram: int | None = dataclasses.field(default=None, metadata={"static": True})
    logits_fn: Callable[[Array, Text], Array] | None = None

    def __post_init__(self) -> None:
        finite = ("finite", math.isfinite)
        rules: dict[str, tuple[str, Callable[[float], bool]]] = {
            "temperature": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
            "top_k": ("a whole number, at least 1 and below 2 ** 31", lambda x: 1 <= x < 2**31 and x == int(x)),
            "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
            "min_p": ("at least 0 and at most 1", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("above 0 and finite", lambda x: 0 < x < math.inf),
            "presence_penalty": finite,
            "frequency_penalty": finite,
            "no_repeat_ngram": ("at least 1 and a whole number", lambda x: x >= 1),
        }
        for name, (rule, holds) in rules.items():
            value = getattr(self, name)
            # JAX rebuilds pytrees around placeholders too; only a concrete number can be checked.
            if isinstance(value, jax.Array) and value.ndim:
                raise ValueError(f"Sampler: {name} must be one number for all rows; got shape={value.shape}.")
            if name == "no_repeat_ngram" and not isinstance(value, int | None):
                raise ValueError(f"Sampler: {name} must be {rule}; got {name}={value}.")
            if isinstance(value, int | float | jax.Array) and is_concrete(value):
                with np.errstate(over="ignore"):
                    known = float(np.float32(value))  # the number that is used
                if not holds(known):
                    raise ValueError(f"Sampler: {name} must be {rule}; got {name}={value}.")

    def as_arrays(self, vocab_size: int) -> Sampler:
        """The same sampler with arrays for numbers, so that 1 and 1.0 are one program; a temperature of 0 becomes None.

        Raises:
            ValueError: a logit_bias that does not fit the vocabulary.
        """
        numbers: dict[str, Any] = {
            field.name: _number(value, np.int32 if field.name == "top_k" else np.float32)
            for field in dataclasses.fields(self)
            if field.name not in ("no_repeat_ngram", "logits_fn", "logit_bias")
            and (value := getattr(self, field.name)) is not None
        }
        if is_concrete(self.temperature) and not self.temperature:
            numbers["temperature"] = None
        logits_fn = None if self.logits_fn is None else function_pytree(self.logits_fn)
        bias = None if self.logit_bias is None else _bias_array(self.logit_bias, vocab_size)
        return dataclasses.replace(self, **numbers, logits_fn=logits_fn, logit_bias=bias)

    @property
    def reads_text(self) -> bool:
        """Whether the draw depends on the text."""
        reading = self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram
        return any(field is not None for field in (*reading, self.logits_fn))

    def penalise(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        """The float32 logits after all steps before the temperature.

        Raises:
            ValueError: penalties without a text, or logits of another shape.
        """
        check_shape("Sampler", "logits", logits, ("rows", "vocab_size"))
        if text is None and self.reads_text:
            raise ValueError("Sampler: penalties, n-grams and logits_fn need the text so far; got text=None.")
        logits, size = logits.astype(jnp.float32), logits.shape[-1]
        if self.logit_bias is not None:
            logits = logits + jnp.asarray(_bias_array(self.logit_bias, size))[None]
        if text is None:
            return logits
        if self.repetition_penalty is not None:
            penalty = self.repetition_penalty
            changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(text.counts(size, prompt=True) > 0, changed, logits)
        if self.presence_penalty is not None or self.frequency_penalty is not None:
            counts = text.counts(size, prompt=False)
            if self.presence_penalty is not None:
                logits = logits - self.presence_penalty * (counts > 0)
            if self.frequency_penalty is not None:
                logits = logits - self.frequency_penalty * counts
        if self.no_repeat_ngram is not None:
            logits = jnp.where(text.completes_ngram(self.no_repeat_ngram, size), -jnp.inf, logits)
        if self.logits_fn is not None:
            shape, logits = logits.shape, self.logits_fn(logits, text)
            if jnp.shape(logits) != shape:
                raise ValueError(
                    f"Sampler: logits_fn must return logits of the shape that it gets; got {jnp.shape(logits)} for "
                    f"{shape}."
                )
        return logits.astype(jnp.float32)

    def cut(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Penalised logits / temperature, -inf for tokens that are cut off; the draw is from their softmax."""
        check_shape("Sampler", "logits", logits, ("rows", "vocab_size"))
        scaled = logits
        if self.temperature is not None:
            scaled = logits / jnp.where(jnp.asarray(self.temperature) == 0, 1.0, self.temperature)
        for name, keep in CUTS.items():
            if (number := getattr(self, name)) is not None:
                scaled = keep(scaled, number)
        return scaled

    def probabilities(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        """The distribution that `__call__` draws from; at temperature 0, 1 for the likeliest token."""
        logits = self.penalise(logits, text)

        def likeliest() -> Array:
            return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)

        if self.temperature is None:
            return likeliest()
        return lax.cond(jnp.asarray(self.temperature) == 0, likeliest, lambda: jax.nn.softmax(self.cut(logits)))

    def __call__(self, logits: Float[Array, "B V"], keys: Array | None, text: Text | None = None) -> Int[Array, "B"]:
        """One token for each row; `keys` holds a typed key for each row, or is None with temperature=None."""
        logits = self.penalise(logits, text)

        def likeliest() -> Array:
            return logits.argmax(-1).astype(jnp.int32)

        if self.temperature is None:
            return likeliest()
        if keys is None:
            raise ValueError(
                "Sampler: drawing needs keys; got keys=None. Pass one typed key a row, or temperature=None."
            )
        check_shape("Sampler", "keys", keys, logits.shape[:1])
        return lax.cond(
            jnp.asarray(self.temperature) == 0,
            likeliest,
            lambda: jax.vmap(jax.random.categorical)(keys, self.cut(logits)).astype(jnp.int32),
        )


def keep_top_k(logits: Float[Array, "B V"], k: int | Int[ArrayLike, ""]) -> Float[Array, "B V"]:
    """-inf for all but the k largest logits of each row and the logits that equal the smallest of them."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    threshold = jnp.take(ordered, jnp.clip(jnp.asarray(k), 1, logits.shape[-1]) - 1, axis=-1)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[ArrayLike, ""]) -> Float[Array, "B V"]:
    """-inf for all but the fewest largest logits of each row whose probabilities sum to at least p."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # Mass of each token and all less likely tokens: a sum from the front loses a tail below 1e-7, even for p = 1.
    rest = lax.cumsum(probabilities, axis=probabilities.ndim - 1, reverse=True)
    keep = (rest > 1 - p).at[..., 0].set(True)
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: float | Float[ArrayLike, ""]) -> Float[Array, "B V"]:
    """-inf for the tokens that are less than p times as likely as the likeliest of their row."""
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p)), logits, -jnp.inf)


CUTS: dict[str, Callable[[Array, Any], Array]] = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
"""The fields of a `Sampler` that cut off tokens of a draw, in the order of their use: `(logits, number) -> logits`."""


def _number(value: Any, dtype: Any) -> Any:
    """The number as an array; NumPy converts a concrete one, since JAX would compile the conversion."""
    return np.asarray(value, dtype) if is_concrete(value) else value.astype(dtype)


def _bias_array(bias: Any, vocab_size: int) -> Any:
    """The bias as an array; raises ValueError for a bias that does not fit the vocabulary."""
    if isinstance(bias, Mapping):
        wrong = [token for token in bias if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"Sampler: logit_bias must name tokens from 0 to {vocab_size - 1}; got {wrong}.")
        array = np.zeros(vocab_size, np.float32)
        array[list(bias)] = list(bias.values())
        return jnp.asarray(array)
    if jnp.shape(bias) != (vocab_size,):
        raise ValueError(f"Sampler: logit_bias must have shape ({vocab_size},); got {jnp.shape(bias)}.")
    return bias
