"""The cross-entropy of a language model's logits, which holds the logits of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import P

from attnax.checks import wide_dtype
from attnax.sharding import AXES, current_mesh, cut_of
from attnax.typing import Array, Float, Int

__all__ = ["logits_of_chunk", "weighted_cross_entropy"]

_LOGITS = 1 << 21  # of a chunk: 8 MiB in float32
_TOKENS = 256  # of a chunk, at least: with fewer the sums of the head's gradient take time


def logits_of_chunk(rows: int, length: int, vocab_size: int) -> int:
    """The number of logits that are held at a time, of a device with `rows` rows of `length` tokens."""
    return rows * _cut_length(rows, length, vocab_size)[1] * vocab_size


def _cut_length(rows: int, length: int, vocab_size: int) -> tuple[int, int]:
    """The number of chunks, and of each row's tokens in a chunk: at least one, so that many rows are large chunks."""
    held = max(_TOKENS, _LOGITS // vocab_size)
    size = max(1, -(-length // max(1, -(-rows * length // held))))
    return -(-length // size), size


def weighted_cross_entropy(
    logits_of: Callable[[Any, Array], Array],
    head: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    specs: Any = None,
) -> Float[Array, ""]:
    """sum_i weights_i * -log softmax(logits_of(head, hidden_i))[targets_i] over all tokens i, in nats.

    Tokens are computed in chunks, and under `jax.grad` each chunk's gradients together with its loss: the logits of all
    tokens are never held, and none are computed twice. A chunk holds some tokens of every row, so that a batch that is
    cut over devices stays where it is. A token of weight 0 adds nothing to the loss or a gradient, even if it is NaN.

    Args:
        logits_of: `(head, hidden) -> logits` of each token, (B, t, D) -> (B, t, V).
        head: a pytree of arrays, the parameters of `logits_of`; it has gradients.
        hidden: has gradients.
        targets: no gradients.
        weights: no gradients.
        specs: under the mesh of a layout, the cut of each array of `head` by fsdp (`attnax.nn.axes.fsdp_specs`); None
            if they are whole.

    Returns:
        The sum, in the dtype of the logits.

    Under the mesh of a layout each device computes the losses of its tokens. The head is gathered once, and its
    gradient is added up and cut again once.

    Raises:
        TypeError: forward-mode differentiation (`jax.jvp`).
    """
    mesh, axes = current_mesh(), [name for name in AXES if name != "tensor"]  # XLA cuts the vocabulary
    if mesh is None or all(mesh.shape[name] == 1 for name in axes):  # every device has all tokens
        return _weighted_cross_entropy(logits_of, head, hidden, targets, weights)
    by_row, by_token = (cut_of(mesh, size, name) for size, name in zip(targets.shape, ("batch", "length"), strict=True))
    # An axis that a spec leaves out costs a sum of gradients over it, also if it is one device.
    by_row += tuple(name for name in axes if mesh.shape[name] == 1)
    spec, dtypes = P(by_row, by_token or None), jax.tree.map(lambda x: x.dtype, head)
    specs = jax.tree.map(lambda _: P(), head) if specs is None else specs

    def local(head: Any, hidden: Array, targets: Array, weights: Array) -> Array:
        head = jax.tree.map(_gathered, specs, dtypes, head)
        return jax.lax.psum(_weighted_cross_entropy(logits_of, head, hidden, targets, weights), by_row + by_token)

    wide = jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), head)  # gradients of several devices are added so
    run = jax.shard_map(local, in_specs=(specs, spec, spec, spec), out_specs=P(), axis_names=set(axes), check_vma=False)
    return run(wide, hidden, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(spec: P, dtype: Any, x: Array) -> Array:
    """All of an array, of which a device has the part that `spec` says; `dtype` travels, and gradients in that of x."""
    x = x.astype(dtype)
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def _scattered(spec: P, _: Any, like: Array, gradient: Array) -> tuple[Array]:
    gradient = gradient.astype(like.dtype)
    for axis, name in enumerate(spec):
        if name is not None:
            gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=axis, tiled=True)
    return (gradient,)


_gathered.defvjp(lambda spec, dtype, x: (_gathered(spec, dtype, x), jnp.zeros(0, x.dtype)), _scattered)


def _weighted_cross_entropy(
    logits_of: Callable[[Any, Array], Array], head: Any, hidden: Array, targets: Array, weights: Array
) -> Array:

    def loss_of_chunk(head: Any, hidden: Array, targets: Array, weights: Array) -> Array:
        hidden = jnp.where((weights == 0)[..., None], 0, hidden)  # before the products, or 0 * NaN gives NaN gradients
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(head, hidden), targets)
        return (weights * losses).sum()

    @jax.custom_vjp
    def total(head: Any, hidden: Array, chunks: tuple[Array, Array]) -> Array:
        def add(loss: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
            return loss + loss_of_chunk(head, *chunk), None

        return jax.lax.scan(add, zero, (hidden, *chunks))[0]

    def total_and_gradients(head: Any, hidden: Array, chunks: tuple[Array, Array]) -> tuple[Array, Any]:
        def add(sums: Any, chunk: tuple[Array, ...]) -> tuple[Any, Array]:
            loss, (by_head, by_hidden) = jax.value_and_grad(loss_of_chunk, argnums=(0, 1))(head, *chunk)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, (loss, by_head)), by_hidden

        by_head = jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), head)
        (loss, by_head), by_hidden = jax.lax.scan(add, (zero, by_head), (hidden, *chunks))
        return loss, (jax.tree.map(lambda total, x: total.astype(x.dtype), by_head, head), by_hidden)

    def scale(gradients: Any, factor: Array) -> tuple[Any, Array, None]:
        by_head, by_hidden = jax.tree.map(lambda x: x * factor.astype(x.dtype), gradients)
        return by_head, by_hidden, None

    total.defvjp(total_and_gradients, scale)
    rows, length = targets.shape
    logits = jax.eval_shape(logits_of, head, hidden)
    num_chunks, size = _cut_length(rows, length, logits.shape[-1])
    zero = jnp.zeros((), logits.dtype)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, num_chunks, size, *x.shape[2:]), 1, 0)

    return total(head, cut(hidden), (cut(targets), cut(weights.astype(zero.dtype))))
