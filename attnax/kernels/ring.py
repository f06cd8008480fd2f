"""Attention over a sequence that is cut across devices: keys and values go round a ring, queries stay."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.checks import attention_options, check_attention
from attnax.kernels._call import Backend, attend, check_block_size, nothing, prepare_part
from attnax.kernels._ring import Ring, attend_ring
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
        mask: of the whole sequence, the same on every device, by default none: indices are global, arrays broadcast to
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
    out, lse = attend_ring(call.plan, ring, call.arrays, call.operands.learned, call.operands)
    return out.astype(query.dtype), lse


def _axis_size(axis_name: Any) -> int:
    try:
        return lax.axis_size(axis_name)
    except (NameError, TypeError):
        raise ValueError(
            "ring_attention: axis_name must name a mesh axis of the jax.shard_map that it is called in; "
            f"got axis_name={axis_name!r}."
        ) from None
