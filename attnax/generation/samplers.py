"""From logits to the next token: penalties on tokens of the text, cuts to likely tokens, and the draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.checks import check_shape, is_concrete
from attnax.generation.candidates import CUTS, Cuts, cut_logits, draw_kept, draw_token, likeliest_token
from attnax.generation.text import Text
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, Float, Int

__all__ = ["Sampler"]

Number = float | Array | np.ndarray | np.generic
"""A number for all rows, or an array (rows,) of one for each."""

_FINITE = ("finite", np.isfinite)
_RULES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("at least 0 and finite", lambda x: (x >= 0) & (x < np.inf)),
    "top_k": ("a whole number, at least 1 and below 2 ** 31", lambda x: (x >= 1) & (x < 2**31) & (x == np.floor(x))),
    "top_p": ("above 0 and at most 1", lambda x: (x > 0) & (x <= 1)),
    "min_p": ("at least 0 and at most 1", lambda x: (x >= 0) & (x <= 1)),
    "repetition_penalty": ("above 0 and finite", lambda x: (x > 0) & (x < np.inf)),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
}
"""The fields that are numbers, and the rule of each."""


@pytree_dataclass
class Sampler:
    """Draws a token from softmax(logits / temperature), after penalties, among the likeliest tokens.

    Penalties come first, then the temperature, then top_k, top_p and min_p, applied in this order; None leaves a step
    out. The numbers are leaves of a pytree, so new values compile nothing. Only temperature 0, greedy decoding,
    is a program of its own.

    Each number may be an array (rows,), with a number for each row. A row's token is the token of a sampler that holds
    the row's numbers. These numbers change nothing, for rows that do without a step: top_k of at least the vocabulary's
    size, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0 and frequency_penalty=0.

    Attributes:
        temperature: 0 or None takes the likeliest token; 1 samples the model's own distribution.
        top_k: keep the k likeliest tokens, and tokens that tie with the last of them.
        top_p: keep the fewest likeliest tokens whose probabilities sum to p (nucleus sampling).
        min_p: keep the tokens that are at least min_p times as likely as the likeliest.
        logit_bias: added to the logits: an array (vocab_size,) or (rows, vocab_size), or a mapping of token ids to
            numbers.
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
        ValueError: a number out of range, in any row, or an array of another rank.

    References:
        A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, https://arxiv.org/abs/1904.09751.
        N. Keskar et al., "CTRL", 2019, https://arxiv.org/abs/1909.05858, section 4.1 (repetition).
        M. Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, https://arxiv.org/abs/2407.01082.
    """

    temperature: Number | None = 0.0
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    logit_bias: Any = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    no_repeat_ngram: int | None = dataclasses.field(default=None, metadata={"static": True})
    logits_fn: Callable[[Array, Text], Array] | None = None

    def __post_init__(self) -> None:
        for name, (rule, holds) in _RULES.items():
            _check_number(name, getattr(self, name), rule, holds)
        size = self.no_repeat_ngram
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise ValueError(
                f"Sampler: no_repeat_ngram must be at least 1 and a whole number; got no_repeat_ngram={size}."
            )

    def as_arrays(self, vocab_size: int) -> Sampler:
        """The same sampler with arrays for numbers, so that 1 and 1.0 are one program; a temperature of 0 becomes None.

        Raises:
            ValueError: a logit_bias that does not fit the vocabulary.
        """
        numbers: dict[str, Any] = {
            name: _number(value, np.int32 if name == "top_k" else np.float32)
            for name in _RULES
            if (value := getattr(self, name)) is not None
        }
        if is_concrete(self.temperature) and not np.any(self.temperature):
            numbers["temperature"] = None
        logits_fn = None if self.logits_fn is None else function_pytree(self.logits_fn)
        bias = None if self.logit_bias is None else _bias_array(self.logit_bias, vocab_size)
        return dataclasses.replace(self, **numbers, logits_fn=logits_fn, logit_bias=bias)

    def repeat_rows(self, batch: int, count: int) -> Sampler:
        """The sampler of `batch` * `count` rows: numbers of `batch` rows are repeated `count` times each.

        Raises:
            ValueError: arrays with another number of rows.
        """
        given = {name: getattr(self, name) for name in _RULES if np.ndim(getattr(self, name)) == 1}
        if not isinstance(self.logit_bias, Mapping) and np.ndim(self.logit_bias) == 2:
            given["logit_bias"] = self.logit_bias
        for name, value in given.items():
            if value.shape[0] not in (batch, batch * count):
                rows = f"{batch * count}" if count == 1 else f"{batch} or {batch * count}"
                raise ValueError(
                    f"Sampler: {name} must be one for all rows, or one a row, here {rows}; got shape={value.shape}."
                )
            if value.shape[0] == batch:
                given[name] = (np if isinstance(value, np.ndarray) else jnp).repeat(value, count, axis=0)
        return dataclasses.replace(self, **given)

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
        logits, (num_rows, size) = logits.astype(jnp.float32), logits.shape
        if self.logit_bias is not None:
            bias = jnp.asarray(_bias_array(self.logit_bias, size))
            if bias.ndim == 2:
                check_shape("Sampler", "logit_bias", bias, (num_rows, size))
            logits = logits + (bias if bias.ndim == 2 else bias[None])
        if text is None:
            return logits
        if self.repetition_penalty is not None:
            penalty = self._column("repetition_penalty", num_rows)
            logits = text.change(logits, lambda x: jnp.where(x > 0, x / penalty, x * penalty), prompt=True)
        if self.presence_penalty is not None:
            presence = self._column("presence_penalty", num_rows)
            logits = text.change(logits, lambda x: x - presence, prompt=False)
        if self.frequency_penalty is not None:
            logits = logits - self._column("frequency_penalty", num_rows) * text.counts(size)
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
        cuts, wanted = self._cuts(logits.shape[0])
        scaled = self._scale(logits)
        return scaled if cuts is None else cut_logits(scaled, cuts, wanted)

    def probabilities(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        """The distribution that `__call__` draws from; at temperature 0, 1 for the likeliest token."""
        logits = self.penalise(logits, text)

        def likeliest() -> Array:
            return jax.nn.one_hot(likeliest_token(logits), logits.shape[-1], dtype=jnp.float32)

        return self._unless_greedy(logits.shape[0], likeliest, lambda: jax.nn.softmax(self.cut(logits)))

    def __call__(self, logits: Float[Array, "B V"], keys: Array | None, text: Text | None = None) -> Int[Array, "B"]:
        """One token for each row; `keys` holds a typed key for each row, or is None with temperature=None.

        Raises:
            ValueError: other keys, or numbers for another number of rows.
        """
        logits = self.penalise(logits, text)
        if self.temperature is None:
            return likeliest_token(logits)
        if keys is None:
            raise ValueError(
                "Sampler: drawing needs keys; got keys=None. Pass one typed key a row, or temperature=None."
            )
        check_shape("Sampler", "keys", keys, logits.shape[:1])

        def draw() -> Array:
            cuts, wanted = self._cuts(logits.shape[0])
            scaled = self._scale(logits)
            return draw_token(scaled, keys) if cuts is None else draw_kept(scaled, keys, cuts, wanted)

        return self._unless_greedy(logits.shape[0], lambda: likeliest_token(logits), draw)

    def _column(self, name: str, num_rows: int) -> Array:
        """A number as an array that broadcasts to the logits; raises ValueError for another number of rows."""
        number = jnp.asarray(getattr(self, name))
        if number.shape not in ((), (num_rows,)):
            raise ValueError(
                f"Sampler: {name} must be one number, or one a row, here {num_rows}; got shape={number.shape}."
            )
        return number[:, None] if number.ndim else number

    def _scale(self, logits: Array) -> Array:
        """The logits over the temperature; over 1 in greedy rows."""
        if self.temperature is None:
            return logits
        temperature = self._column("temperature", logits.shape[0])
        return logits / jnp.where(temperature == 0, 1.0, temperature)

    def _cuts(self, num_rows: int) -> tuple[Cuts | None, Array]:
        """The numbers of the cuts of each row, None without a cut, and the rows that are not greedy."""

        def of_rows(name: str) -> Array:
            return jnp.broadcast_to(self._column(name, num_rows), (num_rows, 1))[:, 0]

        given = {name: of_rows(name) for name in CUTS if getattr(self, name) is not None}
        wanted = jnp.ones(num_rows, bool) if self.temperature is None else of_rows("temperature") != 0
        return (Cuts(**given) if given else None), wanted

    def _unless_greedy(self, num_rows: int, likeliest: Callable[[], Array], drawn: Callable[[], Array]) -> Array:
        """`likeliest()` in rows of temperature 0, `drawn()` in all others."""
        if self.temperature is None:
            return likeliest()
        greedy = self._column("temperature", num_rows) == 0
        if greedy.ndim == 0:
            return lax.cond(greedy, likeliest, drawn)

        def mixed() -> Array:
            tokens = drawn()
            return jnp.where(greedy if tokens.ndim == 2 else greedy[:, 0], likeliest(), tokens)

        return lax.cond(greedy.all(), likeliest, mixed)


def _check_number(name: str, value: Any, rule: str, holds: Callable[[Any], Any]) -> None:
    """Raises ValueError unless all that is known of a number keeps its rule."""
    if isinstance(value, list | tuple):
        raise ValueError(f"Sampler: {name} must be a number or an array (rows,); got {value}. Use numpy.array.")
    is_array = isinstance(value, np.ndarray | jax.Array)
    if is_array and value.ndim > 1:
        raise ValueError(
            f"Sampler: {name} must be one number for all rows, or an array (rows,); got shape={value.shape}."
        )
    # JAX rebuilds pytrees around placeholders too; only a concrete number can be checked.
    if not (is_array or isinstance(value, int | float | np.generic)) or not is_concrete(value):
        return
    with np.errstate(over="ignore"):
        known = np.asarray(value).astype(np.float32)  # the numbers that are used
    kept = np.atleast_1d(holds(known))
    if not kept.all():
        row = int(kept.argmin())
        got = f"{name}[{row}]={np.asarray(value)[row]}" if known.ndim else f"{name}={value}"
        raise ValueError(f"Sampler: {name} must be {rule}; got {got}.")


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
    if np.ndim(bias) not in (1, 2) or np.shape(bias)[-1] != vocab_size:
        raise ValueError(
            f"Sampler: logit_bias must have shape ({vocab_size},) or (rows, {vocab_size}); got {np.shape(bias)}."
        )
    return bias
