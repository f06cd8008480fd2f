"""From logits to the next token."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from attnax.typing import Array, ArrayLike, Float, Int, is_concrete, pytree_dataclass

__all__ = ["Sampler"]


@pytree_dataclass
class Sampler:
    """Draws a token from softmax(logits / temperature), cut to the likeliest tokens.

    A pytree whose leaves are the numbers, so that new values compile nothing.

    Attributes:
        temperature: 0 takes the likeliest token; 1 samples the model's own distribution.
        top_k: keep the k likeliest tokens (and those that tie with the last of them); None keeps all.
        top_p: then keep the likeliest tokens whose probabilities reach p together (nucleus sampling); None keeps all.

    Raises:
        ValueError: a negative temperature, top_k below 1, or top_p outside (0, 1].

    References:
        A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, https://arxiv.org/abs/1904.09751.
    """

    temperature: float | Array = 0.0
    top_k: int | Array | None = None
    top_p: float | Array | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
            "top_k": ("at least 1 and below 2 ** 31", lambda x: 1 <= x < 2**31),
            "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
        }
        for name, (rule, holds) in rules.items():
            value = getattr(self, name)
            # JAX rebuilds pytrees around placeholders too; only a number that is known can be judged.
            if isinstance(value, int | float | jax.Array) and is_concrete(value) and not holds(float(value)):
                raise ValueError(f"Sampler: {name} must be {rule}; got {name}={value}.")

    def as_arrays(self) -> Sampler:
        """The same sampler with arrays for numbers, so that 1 and 1.0 are one program."""
        top_k = None if self.top_k is None else jnp.asarray(self.top_k, jnp.int32)
        top_p = None if self.top_p is None else jnp.asarray(self.top_p, jnp.float32)
        return Sampler(jnp.asarray(self.temperature, jnp.float32), top_k, top_p)

    def __call__(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, B]:
        """One token a row; `keys` holds one typed key a row."""
        logits = logits.astype(jnp.float32)
        greedy = jnp.asarray(self.temperature) == 0
        scaled = logits / jnp.where(greedy, 1.0, self.temperature)
        if self.top_k is not None:
            scaled = keep_top_k(scaled, self.top_k)
        if self.top_p is not None:
            scaled = keep_top_p(scaled, self.top_p)
        sampled = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(greedy, logits.argmax(-1), sampled).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int | Int[ArrayLike, ""]) -> Float[Array, "B V"]:
    """-inf for all but the k largest logits of each row and those that equal the smallest of them."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    threshold = jnp.take(ordered, jnp.clip(jnp.asarray(k), 1, logits.shape[-1]) - 1, axis=-1)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[ArrayLike, ""]) -> Float[Array, "B V"]:
    """-inf for all but the fewest largest logits of each row whose probabilities sum to at least p."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens ahead of each
    keep = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
