"""Attention over a sequence that is cut across devices: keys and values go round a ring, queries stay.

Each device attends from its queries to its current keys by the engine of `flash_attention`, merges the softmax states,
and sends the keys on. The backward pass is a second ring: the gradients of the keys travel with the keys until both are
back. No device holds more than its share, forward or backward. A hop whose keys the mask forbids costs only
communication.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnax.checks import attention_options, check_attention
from attnax.kernels._call import Backend, attend, check_block_size, nothing, prepare_part
from attnax.kernels._core import softmax
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.operands import Arrays, Operands
from attnax.kernels._engines import Plan, Results, attend_part, backward_part, finish
from attnax.kernels.standard import standard_attention
from attnax.masks import Mask, names_residuals, resolve_masks, takes_mask_objects
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, MaskMod, ScoreMod, Shaped

__all__ = ["ring_attention", "ring_attention_reference", "zigzag_order"]


class _Options(AttentionOptions, total=False):
    axis_name: str | None
    zigzag: bool
    block_size: int | None


class _Out(_Options, total=False):
    return_lse: Literal[False]


class _OutAndLse(_Options):
    return_lse: Literal[True]


@overload
def ring_attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_Out]) -> Array: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@names_residuals
@takes_mask_objects
def ring_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    axis_name: str | None = None,
    zigzag: bool = False,
    block_size: int | None = None,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """This device's shard of softmax(scale * query @ key^T) @ value, in `jax.shard_map`; memory O((T + S) / P).

    Args:
        query: (batch, num_heads, seq_q / P, head_dim), this device's part of the queries.
        key: (batch, num_kv_heads, seq_kv / P, head_dim).
        value: (batch, num_kv_heads, seq_kv / P, value_dim).
        mask: of the whole sequence, the same on every device: indices are global, arrays broadcast to
            (batch, num_heads, seq_q, seq_kv).
        score_mod: of the whole sequence, with global indices.
        dropout_rng: the same key on every device drops the weights that one device would drop.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.
        axis_name: the mesh axis that cuts the sequence; with None this device holds the whole sequence, and the call is
            `flash_attention`.
        zigzag: the sequence is in `zigzag_order`, which gives each device the same work under a causal mask.
        block_size: queries and keys of a tile, by default chosen by shape and mask.

    Returns:
        (batch, num_heads, seq_q / P, value_dim), and with `return_lse` (batch, num_heads, seq_q / P).

    Raises:
        ValueError: `axis_name` is no mesh axis here, or shapes, dtypes or options do not fit together.
        NotImplementedError: a mask or score mod that mixes pairs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from attnax import masks, ring_attention
        >>> mesh, spec = jax.make_mesh((1,), ("seq",)), jax.P(None, None, "seq")
        >>> attend = partial(ring_attention, axis_name="seq", mask=masks.causal())
        >>> x = jax.device_put(jnp.ones((1, 4, 6, 8)), jax.NamedSharding(mesh, spec))
        >>> jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))(x, x, x).shape
        (1, 4, 6, 8)

    References:
        H. Liu et al., "Ring Attention with Blockwise Transformers", 2023, https://arxiv.org/abs/2310.01889.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    backend: Backend = "automatic" if block_size is None else "tiles"
    if axis_name is None:
        return attend(
            "ring_attention",
            query,
            key,
            value,
            return_lse=return_lse,
            block_size=block_size,
            backend=backend,
            **options,
        )
    out, lse = _attend(query, key, value, axis_name, zigzag, block_size, backend, **options)
    return (out, lse) if return_lse else out


def ring_attention_reference(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
) -> Float[Array, "B N T Hv"]:
    """The result of `ring_attention` on all devices together, computed on one device by `standard_attention`."""
    return standard_attention(query, key, value, mask=mask, score_mod=score_mod)


def zigzag_order(seq_len: int, num_devices: int) -> np.ndarray:
    """The order of a sequence that gives each device one piece from the front and one from the back.

    Cut `x[..., order, :]` into equal shards for `ring_attention(zigzag=True)`; `numpy.argsort(order)` undoes the order.
    Under a causal mask the last queries attend most keys; in this order all devices have the same work.

    Raises:
        ValueError: a length that is no multiple of 2 * num_devices.

    Example:
        >>> from attnax.kernels.ring import zigzag_order
        >>> zigzag_order(8, 2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if num_devices < 1 or seq_len % (2 * num_devices):
        raise ValueError(
            "zigzag_order: the length must be a multiple of 2 * num_devices; "
            f"got seq_len={seq_len}, num_devices={num_devices}. Pad the sequence."
        )
    pieces = np.arange(seq_len).reshape(2 * num_devices, -1)
    return np.concatenate([pieces[[rank, -1 - rank]].ravel() for rank in range(num_devices)])


def _attend(
    query: Array,
    key: Array,
    value: Array,
    axis_name: str,
    zigzag: bool,
    block_size: int | None,
    backend: Backend,
    **options: Unpack[AttentionOptions],
) -> tuple[Array, Array]:
    """(out, log-sum-exp) of `ring_attention` over a mesh axis."""
    size = _axis_size(axis_name)
    mask = options.get("mask")
    checked: Any = options
    if isinstance(mask, jax.Array | np.ndarray):
        checked = {**options, "mask": np.zeros((), mask.dtype)}  # its shape is global
    check_attention("ring_attention", query, key, value, **checked)
    check_block_size("ring_attention", block_size)
    batch, heads, seq_q, _ = query.shape
    seq_kv, value_dim = value.shape[2:]
    if zigzag and (seq_q % 2 or seq_kv % 2):
        raise ValueError(
            "ring_attention: zigzag gives each device two pieces, so its length must be even; "
            f"got {seq_q} queries and {seq_kv} keys on a device."
        )
    score_shape = batch, heads, seq_q * size, seq_kv * size
    mask, score_mod = resolve_masks("ring_attention", mask, options.get("score_mod"), score_shape)
    if 0 in (batch, seq_q, seq_kv, value_dim):
        return nothing(query, value)
    ring = Ring(axis_name, size, zigzag)
    call = prepare_part(
        "ring_attention",
        (query, key, value),
        (ring.index(0, seq_q), ring.index(0, seq_kv)),
        score_shape,
        {**options, "mask": mask, "score_mod": score_mod},
        block_size=block_size,
        backend=backend,
        pieces=2 if zigzag else 1,  # a tile of two pieces would have no useful bounds
    )
    out, lse = _ring(call.plan, ring, call.arrays, call.operands.learned, call.operands)
    return out.astype(query.dtype), lse


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
_ring = jax.jit(_ring_of, static_argnums=(0, 1))


def _axis_size(axis_name: Any) -> int:
    try:
        return lax.axis_size(axis_name)
    except (NameError, TypeError):
        raise ValueError(
            "ring_attention: axis_name must name a mesh axis of the jax.shard_map that it is called in; "
            f"got axis_name={axis_name!r}."
        ) from None
