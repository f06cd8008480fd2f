"""Attention of a device's queries to keys that go round the devices of a mesh axis, and its derivative.

Each device attends from its queries to its current keys by the engine of `flash_attention`, merges the softmax states,
and sends the keys on. The backward pass is a second ring: the gradients of the keys travel with the keys until both are
back. No device holds more than its share, forward or backward. A hop whose keys the mask forbids costs only
communication.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnax.kernels._core import softmax
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.operands import Arrays, Operands
from attnax.kernels._engines import Plan, Results, attend_part, backward_part, finish
from attnax.typing import Array

__all__ = ["Ring", "attend_ring"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along a mesh axis; each sends to the next."""

    axis_name: str
    size: int
    zigzag: bool

    def index(self, hop: Any, length: int) -> Array:
        """Global indices of the shard that is on this device after `hop` hops."""
        rank = (lax.axis_index(self.axis_name) - hop) % self.size
        if not self.zigzag:
            return rank * length + jnp.arange(length, dtype=jnp.int32)
        piece = jnp.arange(length // 2, dtype=jnp.int32)
        return jnp.concatenate([rank * len(piece) + piece, (2 * self.size - 1 - rank) * len(piece) + piece])

    def zigzag_of(self, x: Array) -> Array:
        """This device's rows of axis 2 in zigzag order, from its rows of the sequence in order."""
        return self._exchange(x, back=False)

    def in_order(self, x: Array) -> Array:
        """This device's rows of axis 2 in order, from its rows in zigzag order."""
        return self._exchange(x, back=True)

    def _exchange(self, x: Array, *, back: bool) -> Array:
        # Of the 2P pieces of the sequence, device r has 2r and 2r + 1 in order, and r and 2P - 1 - r in zigzag order:
        # one of these is even. The even pieces travel together, and so do the odd ones.
        last, rank = 2 * self.size - 1, lax.axis_index(self.axis_name)
        holder = [min(piece, last - piece) for piece in range(last + 1)]
        first, second = jnp.split(x, 2, axis=2)
        swaps = rank % 2 == 1
        pieces = (jnp.where(swaps, second, first), jnp.where(swaps, first, second)) if back else (first, second)
        moved = []
        for parity, piece in enumerate(pieces):
            moves = [(rank, holder[2 * rank + parity]) for rank in range(self.size)]
            moves = [(there, here) for here, there in moves] if back else moves
            moved.append(lax.ppermute(piece, self.axis_name, moves))
        even, odd = moved
        if not back:
            even, odd = jnp.where(swaps, odd, even), jnp.where(swaps, even, odd)
        return jnp.concatenate([even, odd], axis=2)

    def operands(self, operands: Operands, hop: Any, key: Array, query: Array) -> Operands:
        """The operands with the indices of the keys that are here after `hop` hops."""
        index = vary(self.index(hop, key.shape[2]), varying_axes(query))
        return dataclasses.replace(operands, kv_index=index)

    def send(self, tree: Any) -> Any:
        """Sends every array to the next device; returns the arrays of the previous device."""
        return lax.ppermute(tree, self.axis_name, [(rank, (rank + 1) % self.size) for rank in range(self.size)])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_of(
    plan: Plan, ring: Ring, arrays: Arrays, learned: tuple[Array, ...], operands: Operands
) -> tuple[Array, Array]:
    return _ring_forward(plan, ring, arrays, learned, operands)[0]


def _ring_forward(
    plan: Plan, ring: Ring, arrays: Arrays, learned: tuple[Array, ...], operands: Operands
) -> tuple[tuple[Array, Array], Any]:
    query, key, value, scale = arrays

    def hop(count: Any, carry: Any) -> Any:
        state, shard = carry
        key, value = ring.send(shard)
        here = ring.operands(operands, count, key, query)
        part = softmax.as_state(*attend_part(plan, (query, key, value, scale), here))
        return softmax.merge(state, part), (key, value)

    start = softmax.as_state(*attend_part(plan, arrays, operands)), (key, value)
    state, _ = lax.fori_loop(1, ring.size, hop, start)
    out, lse = checkpoint_name(softmax.finish(state), "attention_out")
    return (out, softmax.in_nats(lse)), (arrays, operands, out, lse)


def _ring_backward(plan: Plan, ring: Ring, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    arrays, operands, out, lse = residuals
    query, key, value, scale = arrays
    results = Results(out, lse, *cotangents)

    def hop(count: Any, carry: Any) -> Any:
        d_query, sums, travelling = carry
        key, value, d_key, d_value = ring.send(travelling)
        here = ring.operands(operands, count, key, query)
        *shares, sums = backward_part(plan, (query, key, value, scale), here, results, sums)
        return d_query + shares[0], sums, (key, value, d_key + shares[1], d_value + shares[2])

    d_query, d_key, d_value, sums = backward_part(plan, arrays, operands, results, operands.gradients())
    d_query, sums, (_, _, *d_shard) = lax.fori_loop(1, ring.size, hop, (d_query, sums, (key, value, d_key, d_value)))
    *d_arrays, d_learned = finish(plan, arrays, operands, (d_query, *ring.send(d_shard), sums))
    return tuple(d_arrays), d_learned, None


_ring_of.defvjp(_ring_forward, _ring_backward)
attend_ring = jax.jit(_ring_of, static_argnums=(0, 1))
