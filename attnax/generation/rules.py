"""A `logits_fn` with the rules of Hugging Face transformers that forbid or force tokens."""

from __future__ import annotations

import jax.numpy as jnp

from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["TokenRules"]


@pytree_dataclass
class TokenRules:
    """A `logits_fn` of a `Sampler`: -inf for forbidden tokens and, beside a forced token, for all other tokens.

    None leaves a rule out. Rules are applied in the order of the attributes, as in transformers. Tokens that the model
    lacks are ignored. New values compile nothing; new shapes compile a program.

    Attributes:
        bad_words: (K, n) sequences of tokens that must not occur in the text, prompt included; filled with -1 on the
            left.
        end_tokens: (M,) tokens forbidden before `min_new_tokens` are written.
        min_new_tokens: an integer.
        forced_first: the first token to write.
        forced_last: (N,) tokens, one of which is the last of `max_new_tokens`.
        max_new_tokens: an integer.
        suppress_tokens: (S,) tokens that are always forbidden.
        begin_suppress_tokens: (T,) tokens forbidden when `begin_index` tokens are written.
        begin_index: an integer, 0 for the first token.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import Sampler
        >>> from attnax.generation import Text, TokenRules
        >>> sampler = Sampler(temperature=None, logits_fn=TokenRules(suppress_tokens=jnp.array([3, 1])))
        >>> text = Text.of_prompt(jnp.array([[2]]), jnp.array([[0]]), 8)
        >>> sampler(jnp.array([[0.0, 1.0, 2.0, 3.0]]), None, text).tolist()
        [2]
    """

    bad_words: Int[ArrayLike, "K n"] | None = None
    end_tokens: Int[ArrayLike, "M"] | None = None
    min_new_tokens: Int[ArrayLike, ""] | int = 0
    forced_first: Int[ArrayLike, ""] | int | None = None
    forced_last: Int[ArrayLike, "N"] | None = None
    max_new_tokens: Int[ArrayLike, ""] | int = 0
    suppress_tokens: Int[ArrayLike, "S"] | None = None
    begin_suppress_tokens: Int[ArrayLike, "T"] | None = None
    begin_index: Int[ArrayLike, ""] | int = 0

    def __call__(self, logits: Float[Array, "R V"], text: Text) -> Float[Array, "R V"]:
        """The logits after the rules."""
        size, written = logits.shape[-1], (text.lengths - text.prompt_lengths)[:, None]

        def forbid(logits: Array, tokens: ArrayLike, where: Array | bool = True) -> Array:
            return jnp.where(where & _among(tokens, size), -jnp.inf, logits)

        def force(logits: Array, tokens: ArrayLike, where: Array) -> Array:
            return jnp.where(where, jnp.where(_among(tokens, size), 0.0, -jnp.inf), logits)

        if self.bad_words is not None:
            logits = jnp.where(_completed(text, jnp.asarray(self.bad_words), size), -jnp.inf, logits)
        if self.end_tokens is not None:
            logits = forbid(logits, self.end_tokens, written < self.min_new_tokens)
        if self.forced_first is not None:
            logits = force(logits, jnp.asarray(self.forced_first)[None], written == 0)
        if self.forced_last is not None:
            logits = force(logits, self.forced_last, written == self.max_new_tokens - 1)
        if self.suppress_tokens is not None:
            logits = forbid(logits, self.suppress_tokens)
        if self.begin_suppress_tokens is not None:
            logits = forbid(logits, self.begin_suppress_tokens, written == self.begin_index)
        return logits


def _among(tokens: Int[ArrayLike, "M"], size: int) -> Bool[Array, "1 V"]:
    return jnp.zeros((1, size), bool).at[0, tokens].set(True, mode="drop")


def _completed(text: Text, sequences: Int[Array, "K n"], size: int) -> Bool[Array, "R V"]:
    """The tokens that would complete one of the sequences."""
    begun, last = sequences[:, :-1], sequences[:, -1]
    count = begun.shape[1]
    same = (text.last(count)[:, None] == begun[None]) & (text.last_positions(count) >= 0)[:, None]
    follows = jnp.where((same | (begun < 0)[None]).all(-1), last[None], size)
    rows = jnp.arange(follows.shape[0])[:, None]
    return jnp.zeros((follows.shape[0], size), bool).at[rows, follows].set(True, mode="drop")
