"""Dropout of attention weights whose bits depend only on (key, b, h, q, kv), never on tiles or devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnax.typing import Array, AttentionOptions, Index


def dropout_words(dropout_rng: Array) -> Array:
    """The words for `keep_weights`, (4,) uint32: two random words from the key, the first row, the first head."""
    return jnp.concatenate([jax.random.bits(dropout_rng, (2,), jnp.uint32), jnp.zeros(2, jnp.uint32)])


def rate_of(options: AttentionOptions) -> float:
    """The dropout rate of a call; 0 if the call is deterministic."""
    return 0.0 if options.get("deterministic", True) else options.get("dropout_rate", 0.0)


def words_of(options: AttentionOptions) -> Array | None:
    """The `dropout_words` of a call; None if the call drops no weights."""
    dropout_rng = options.get("dropout_rng")
    return None if dropout_rng is None or rate_of(options) == 0.0 else dropout_words(dropout_rng)


def words_of_shard(words: Array, row: Array, head: Array) -> Array:
    """The words for a shard whose first row and first head, in the whole array, are `row` and `head`."""
    return jnp.concatenate([words[:2], jnp.stack([row, head]).astype(jnp.uint32)])


def keep_weights(
    words: Array | tuple[Array, ...], dropout_rate: float, b: Index, h: Index, q: Index, kv: Index
) -> Array:
    """True where the attention weight of (b, h, q, kv) is kept; indices count from the shard's first row and head.

    One word is hashed from (key, b, h, q) for each row of weights. Each weight then costs one more `_mix`, far less
    than a counter-based generator.
    """
    b, h, q, kv = (jnp.asarray(index).astype(jnp.uint32) for index in (b, h, q, kv))
    word_0, word_1, first_row, first_head = words
    b, h = b + first_row, h + first_head
    row = _mix(_mix(_mix(q + word_0) ^ (h * jnp.uint32(0x9E3779B9))) + b * jnp.uint32(0x85EBCA6B) + word_1)
    bits = _mix(row ^ _mix(kv + word_1))
    return bits >= jnp.uint32(min(round(dropout_rate * 2**32), 2**32 - 1))


def dropout_of(
    words: Array | tuple[Array, ...], dropout_rate: float, b: Index, h: Index, q: Index, kv: Index
) -> Callable[[Array], Array]:
    """A function that applies dropout to the weights of the pairs at these indices."""
    kept = keep_weights(words, dropout_rate, b, h, q, kv)
    return lambda weights: jnp.where(kept.reshape(weights.shape), weights / (1.0 - dropout_rate), 0)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words that flips each output bit with each input bit about half the time.

    References: C. Wellons, "Prospecting for hash functions", 2018 (the constants of lowbias32).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
