"""The cross-entropy of a language model's logits, which holds the logits of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnax.checks import wide_dtype
from attnax.typing import Array, Float, Int

__all__ = ["weighted_cross_entropy"]

_LOGITS = 1 << 21  # of a chunk: 8 MiB in float32
_TOKENS = 512  # of a chunk at least: the products of fewer tokens are slower


def weighted_cross_entropy(
    logits_of: Callable[[Any, Array], Array],
    head: Any,
    hidden: Float[Array, "M D"],
    targets: Int[Array, "M"],
    weights: Float[Array, "M"],
) -> Float[Array, ""]:
    """sum_i weights_i * -log softmax(logits_of(head, hidden_i))[targets_i], in nats.

    Tokens are computed in chunks, and under `jax.grad` each chunk's gradients together with its loss: the logits of all
    tokens are never held, and none are computed twice. A token of weight 0 adds nothing, even if its loss is NaN.

    Args:
        logits_of: `(head, hidden) -> logits` of each token, (chunk, D) -> (chunk, V).
        head: a pytree of arrays, the parameters of `logits_of`; it has gradients.
        hidden: has gradients.
        targets: no gradients.
        weights: no gradients.

    Raises:
        TypeError: forward-mode differentiation (`jax.jvp`).
    """

    def loss_of_chunk(head: Any, hidden: Array, targets: Array, weights: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(head, hidden), targets)
        return jnp.where(weights == 0, 0.0, weights * losses).sum()

    @jax.custom_vjp
    def total(head: Any, hidden: Array, chunks: tuple[Array, Array]) -> Array:
        def add(loss: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
            return loss + loss_of_chunk(head, *chunk), None

        return jax.lax.scan(add, zero, (hidden, *chunks))[0]

    def total_and_gradients(head: Any, hidden: Array, chunks: tuple[Array, Array]) -> tuple[Array, Any]:
        def add(sums: Any, chunk: tuple[Array, ...]) -> tuple[Any, Array]:
            loss, (by_head, by_hidden) = jax.value_and_grad(loss_of_chunk, argnums=(0, 1))(head, *chunk)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, (loss, by_head)), by_hidden

        by_head = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)), head)
        (loss, by_head), by_hidden = jax.lax.scan(add, (zero, by_head), (hidden, *chunks))
        return loss, (jax.tree.map(lambda total, x: total.astype(x.dtype), by_head, head), by_hidden)

    def scale(gradients: Any, factor: Array) -> tuple[Any, Array, None]:
        by_head, by_hidden = jax.tree.map(lambda x: x * factor.astype(x.dtype), gradients)
        return by_head, by_hidden, None

    total.defvjp(total_and_gradients, scale)
    num_tokens, zero = len(targets), jnp.zeros((), weights.dtype)
    vocabulary = jax.eval_shape(logits_of, head, hidden).shape[-1]
    num_chunks = -(-num_tokens // max(_TOKENS, _LOGITS // vocabulary))
    size = -(-num_tokens // num_chunks)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, num_chunks * size - num_tokens)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(num_chunks, size, *x.shape[1:])

    return total(head, cut(hidden), (cut(targets), cut(weights)))
