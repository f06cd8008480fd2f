"""The tokens of a mixture to their experts and back, on one device and on the devices of a layout.

Every token is copied once for each of its experts, the copies are sorted by expert, and each expert is a few products
of its rows (`grouped_product`). Where a layout cuts the experts, each device gathers the tokens of the devices that
hold the other experts, computes its own, and every token gets the sum over the devices. No matrix moves between these.

Axes: M tokens, C experts of a token, R = M * C rows, E experts, D the width, F the hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax

from attnax.config import BlockConfig
from attnax.kernels.grouped import grouped_product
from attnax.nn.feedforward import activate
from attnax.sharding import Axis, current_mesh, partition, stream_axes
from attnax.typing import Array, Float

__all__ = ["DOWN", "UP", "Experts", "Routes", "mix"]

UP: tuple[Axis, ...] = ("experts", "embed", "hidden")
DOWN: tuple[Axis, ...] = ("experts", "hidden", "embed")
"""The names of the axes of the experts' matrices."""


class Experts(NamedTuple):
    """The parameters of the experts; gate and biases may be None."""

    up: Any  # (E, D, F)
    gate: Any
    down: Any  # (E, F, D)
    up_bias: Any  # (E, F)
    gate_bias: Any
    down_bias: Any  # (E, D)


class Routes(NamedTuple):
    """The experts of each token, for tokens (...) of any leading axes.

    Attributes:
        experts: int32 (..., C), their numbers.
        weights: (..., C), the factors of their outputs.
        kept: boolean (..., C, F), the hidden features that dropout keeps, or None.
    """

    experts: Any
    weights: Any
    kept: Any


def mix(config: BlockConfig, experts: Experts, x: Float[Array, "*L D"], routes: Routes) -> Float[Array, "*L D"]:
    """sum_c weights[c] * expert_{experts[c]}(x) of each token."""
    mesh = current_mesh()
    if mesh is None:
        return _mix(config, experts, x, routes, 0)
    of_tokens = partition(mesh, x.shape, stream_axes(x.ndim))
    of_hidden = partition(mesh, experts.up.shape, UP, without=("fsdp",))
    by_expert, by_hidden = of_hidden[0], of_hidden[2]
    of_bias = P(by_expert, by_hidden)
    whole = Experts(of_hidden, of_hidden, P(by_expert, by_hidden), of_bias, of_bias, P(by_expert))
    cuts = Experts(*(None if x is None else cut for x, cut in zip(experts, whole, strict=True)))
    leading = of_tokens[: x.ndim - 1]
    route = Routes(P(*leading), P(*leading), None if routes.kept is None else P(*leading, None, by_hidden))

    def local(experts: Experts, x: Array, routes: Routes) -> Array:
        if by_hidden is not None and experts.down_bias is not None:  # added once, where the products are summed
            experts = experts._replace(down_bias=jnp.where(lax.axis_index(by_hidden) == 0, experts.down_bias, 0))
        if by_expert is None:
            out = _mix(config, experts, x, routes, 0)
            return out if by_hidden is None else lax.psum(out, by_hidden)
        flat = jax.tree.map(lambda array: array.reshape(-1, *array.shape[x.ndim - 1 :]), (x, routes))
        tokens, routes = lax.all_gather(flat, by_expert, tiled=True)
        out = _mix(config, experts, tokens, routes, lax.axis_index(by_expert) * experts.up.shape[0])
        if by_hidden is not None:
            out = lax.psum(out, by_hidden)
        return lax.psum_scatter(out, by_expert, tiled=True).reshape(x.shape)

    narrow = jax.tree.map(lambda array: array.astype(x.dtype), experts)  # so that the narrow dtype travels
    run = jax.shard_map(local, in_specs=(cuts, of_tokens, route), out_specs=of_tokens, check_vma=False)
    return run(narrow, x, routes)


def _mix(config: BlockConfig, experts: Experts, x: Array, routes: Routes, first: Any) -> Array:
    """`mix` by the experts that are here, numbers `first` and on; the other ones add nothing."""
    here, width = experts.up.shape[0], x.shape[-1]
    num_chosen = routes.experts.shape[-1]
    assigned = routes.experts.reshape(-1) - first
    is_here = (assigned >= 0) & (assigned < here)
    assigned = jnp.where(is_here, assigned, here)
    sizes = jnp.bincount(assigned, length=here + 1)[:here]
    order = jnp.argsort(assigned)  # rows of other devices' experts come last, and are computed by no expert
    rows = x.reshape(-1, width)[order // num_chosen]
    kept = None if routes.kept is None else routes.kept.reshape(-1, routes.kept.shape[-1])[order]
    outs = _experts(config, experts, rows, sizes, kept)
    outs = outs.at[jnp.argsort(order)].get(unique_indices=True).reshape(-1, num_chosen, width)
    weights = jnp.where(is_here.reshape(-1, num_chosen), routes.weights.reshape(-1, num_chosen), 0)
    return (outs.astype(weights.dtype) * weights[..., None]).sum(1).astype(outs.dtype).reshape(x.shape)


def _experts(
    config: BlockConfig, experts: Experts, rows: Float[Array, "R D"], sizes: Array, kept: Any
) -> Float[Array, "R D"]:
    """The output of each row's expert; rows are sorted by expert."""

    def product(x: Array, matrices: Array, biases: Any) -> Array:
        return grouped_product(x, matrices, biases, sizes)

    up = product(rows, experts.up, experts.up_bias)
    gate = None if experts.gate is None else product(rows, experts.gate, experts.gate_bias)
    hidden = activate(config.ff_activation, up, gate)
    if kept is not None:
        hidden = jnp.where(kept, hidden / (1.0 - config.dropout_rate), 0) if config.dropout_rate < 1.0 else 0 * hidden
    return product(hidden, experts.down, experts.down_bias)
