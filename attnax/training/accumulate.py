"""Forward and backward passes over the microbatches of an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnax.training.objectives import Batch, Loss
from attnax.training.precision import widen
from attnax.typing import Array

__all__ = ["mean_gradient"]


def mean_gradient(
    loss_of: Callable[[Any, Batch, Array], Loss], params: Any, batch: Batch, key: Array, cuts: Any = None
) -> tuple[Any, Loss]:
    """The gradient of the mean loss over all microbatches, one after the other in a loop, and that mean.

    Args:
        loss_of: `(params, microbatch, key) -> loss`.
        params: of the model.
        batch: arrays (accumulate, B, ...).
        key: of the random numbers; microbatch i has `fold_in(key, i)`.
        cuts: the sharding of each parameter on a layout.

    Returns:
        The gradient in float32 or wider, and Loss(mean, weight, means).
    """

    def one(index: Any, microbatch: Batch) -> tuple[Any, Loss]:
        def mean(params: Any) -> tuple[Array, Loss]:
            loss = widen(loss_of(params, microbatch, jax.random.fold_in(key, index)))
            return _divide(loss.sum, loss.weight), loss  # in float16 the gradients of a sum could be too large

        grads, loss = jax.grad(mean, has_aux=True)(params)
        grads, aux = jax.tree.map(lambda x: x * loss.weight, (widen(grads), loss.aux))
        return grads, Loss(loss.sum, loss.weight, aux)

    def add(sums: Any, numbered: Any) -> tuple[Any, Loss]:
        grads, loss = one(*numbered)
        return jax.tree.map(jnp.add, sums, grads), loss

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        grads, loss = one(0, jax.tree.map(lambda x: x[0], batch))
    else:
        zeros = jax.tree.map(jnp.zeros_like, widen(params))
        if cuts is not None:
            zeros = jax.lax.with_sharding_constraint(zeros, cuts)
        grads, losses = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
        loss = jax.tree.map(lambda x: x.sum(axis=0), losses)
    grads, total, aux = jax.tree.map(lambda x: _divide(x, loss.weight), (grads, loss.sum, loss.aux))
    return grads, Loss(total, loss.weight, aux)


def _divide(total: Array, weight: Array) -> Array:
    """total / weight, or for the weight 0 the total, which is 0 too."""
    return total / jnp.where(weight > 0, weight, 1).astype(total.dtype)
