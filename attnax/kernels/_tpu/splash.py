"""Splash attention, the TPU kernels that JAX ships, for the plain calls that they serve.

Inside a block the kernels multiply values by the weight 0 of a forbidden pair, and 0 * NaN is NaN. So the kernels get
zeros in place of non-finite rows, and every contaminated result is set to NaN afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.mesh import varying_axes
from attnax.kernels.score_mods import SoftCap
from attnax.masks import Causal, Mask, SlidingWindow
from attnax.typing import Array, ScoreMod

__all__ = ["splash_backward", "splash_forward", "why_not_splash"]

_LARGEST_HEAD = 256  # in float32 blocks of 512 fit the vector memory of TPUs v4 to v6e at 256, and not at 384
_MOST_BLOCKS = 2**16  # some bytes of scalar memory for each, and some time to trace them


def why_not_splash(
    query: Array | jax.ShapeDtypeStruct,
    key: Array | jax.ShapeDtypeStruct,
    value: Array | jax.ShapeDtypeStruct,
    *,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    dropout_rate: float,
    return_lse: bool,
) -> str | None:
    """The reason why splash attention does not serve a checked call, or None.

    Mask and score mod come from `resolve_masks`. `dropout_rate` is 0 if the call is deterministic. With
    `return_lse` the caller gets the log-sum-exp, which then needs a gradient.

    One more reason may show only when a program is lowered: `jit` compiles for several devices, and the types of its
    arguments do not name one mesh with Auto axes.
    """
    (seq_q, head_dim), (seq_kv, value_dim) = query.shape[2:], value.shape[2:]
    blocks = (seq_q // _block_size(seq_q)) * (seq_kv // _block_size(seq_kv))
    takes_mod = score_mod is None or (isinstance(score_mod, SoftCap) and isinstance(score_mod.cap, int | float))
    takes_lengths = seq_q % 128 == 0 and seq_kv % 128 == 0 and 0 not in (seq_q, seq_kv)
    leaves_empty = isinstance(mask, SlidingWindow) and _is_served(mask) and mask.before <= max(0, seq_q - seq_kv)
    reasons = {
        "splash attention takes no score mod but a soft cap of known size": not takes_mod,
        "splash attention has no dropout": dropout_rate > 0.0,
        "splash attention's log-sum-exp has no gradient": return_lse,
        "splash attention takes float32 and bfloat16 only": query.dtype not in (jnp.float32, jnp.bfloat16),
        f"splash attention takes heads of at most {_LARGEST_HEAD}": max(head_dim, value_dim) > _LARGEST_HEAD,
        "splash attention takes lengths that are multiples of 128": not takes_lengths,
        f"splash attention lists all pairs of blocks of queries and keys, and here are {blocks}": blocks > _MOST_BLOCKS,
        "splash attention takes no masks but causal ones and causal windows of known size": not _is_served(mask),
        "splash attention returns the mean of all values for queries that attend nothing": leaves_empty,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or _why_not_here()


def _why_not_here() -> str | None:
    """The reason why JAX's settings or the mesh around a call exclude splash attention, or None."""
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return "splash attention counts in 32 bits, and JAX in 64 here"
    mesh = jax.sharding.get_abstract_mesh()
    if (mesh.size > 1 or mesh.manual_axes) and set(mesh.axis_types) not in ({AxisType.Auto}, {AxisType.Manual}):
        return "splash attention takes meshes with Auto axes, or a shard_map over all axes"
    # Only the type of a varying value shows whether the shard_map checks varying axes.
    if any(varying_axes(lax.axis_index(axis)) for axis in mesh.manual_axes):
        return "splash attention does not say over which axes of a shard_map it varies; check_vma=False does not ask"
    return None


def splash_forward(
    query: Array, key: Array, value: Array, scale: float | Array, *, mask: Mask | None, score_mod: ScoreMod | None
) -> tuple[Array, Array]:
    """(out in the dtype of query, natural log-sum-exp in float32) of a call that `why_not_splash` accepts."""
    given = _make_finite(query, key, value, scale, mask)
    with _precision(query):
        attend = _kernel(query, key, mask, score_mod, save_residuals=True)
        out, (lse,) = attend(given.query, given.key, given.value)
    return jnp.where(given.contaminated[..., None], jnp.nan, out), jnp.where(given.contaminated, jnp.nan, lse)


def splash_backward(
    query: Array,
    key: Array,
    value: Array,
    scale: float | Array,
    out: Array,
    lse: Array,
    d_out: Array,
    *,
    mask: Mask | None,
    score_mod: ScoreMod | None,
) -> tuple[Array, Array, Array]:
    """The gradients of (scale * query, key, value) in float32, for the cotangent of out.

    JAX has no public function that takes the results of `splash_forward`, but the pullback is a pytree that holds them.
    The known results replace these leaves; XLA then drops the traced forward pass as unused.
    """
    given = _make_finite(query, key, value, scale, mask)
    # The cotangent of a sum is a constant: without the barrier XLA would test its rows while it compiles.
    d_out = lax.optimization_barrier(d_out)
    contaminated = given.contaminated | ~is_finite(d_out)
    d_out, out = (jnp.where(contaminated[..., None], 0, x).astype(query.dtype) for x in (d_out, out))
    lse = jnp.where(contaminated, 0, lse).astype(jnp.float32)
    with _precision(query):
        attend = _kernel(query, key, mask, score_mod, save_residuals=False)
        again, pullback = jax.vjp(attend, given.query, given.key, given.value)
        leaves, structure = jax.tree.flatten(pullback)
        leaves = [out if x is again else lse if (x.shape, x.dtype) == (lse.shape, lse.dtype) else x for x in leaves]
        d_query, d_key, d_value = jax.tree.unflatten(structure, leaves)(d_out)
    batch, kv_heads, seq_kv, _ = key.shape
    any_head = contaminated.reshape(batch, kv_heads, -1, query.shape[2]).any(2)
    contaminated_keys = _reach(any_head, mask, seq_kv, backwards=True)

    def contaminate(gradient: Array, where: Array) -> Array:
        return jnp.where(where[..., None], jnp.nan, gradient.astype(jnp.float32))

    d_key, d_value = (contaminate(x, contaminated_keys) for x in (d_key, d_value))
    return contaminate(d_query, contaminated), d_key, d_value


def _is_served(mask: Mask | None) -> bool:
    if isinstance(mask, SlidingWindow):
        return isinstance(mask.before, int) and isinstance(mask.after, int) and mask.after == 1
    return mask is None or isinstance(mask, Causal)


def _block_size(length: int) -> int:
    """The largest block of at most 512 that divides a length; the last axis of a TPU's registers holds 128."""
    return next(block for block in (512, 384, 256, 128) if length % block == 0 or block == 128)


def _precision(query: Array) -> Any:
    # By default a TPU multiplies float32 in bfloat16, which suits the weights where the inputs are bfloat16.
    return jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default")


def _kernel(query: Array, key: Array, mask: Mask | None, score_mod: ScoreMod | None, *, save_residuals: bool) -> Any:
    """A function of batched (query, key, value), which reads the keys of a group of heads without repeating them."""
    # Imports Pallas for TPU, which takes as long as all other imports and is needed only in programs for a TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, pairs = query.shape[1], (query.shape[2], key.shape[2])
    if mask is None:
        of_head: Any = splash.FullMask(pairs)
    else:
        of_head = _causal_mask()(pairs, (int(mask.before) - 1 if isinstance(mask, SlidingWindow) else None, 0), 0)
    block_q, block_kv = map(_block_size, pairs)
    attend = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([of_head] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        save_residuals=save_residuals,
        attn_logits_soft_cap=float(score_mod.cap) if isinstance(score_mod, SoftCap) else None,
    )
    return jax.vmap(attend)


@functools.cache  # splash reuses the tables of equal masks, and only masks of one class are equal
def _causal_mask() -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask

    class CausalWindow(LocalMask):
        """Splash's mask, one entry for a block in which all pairs are equal: splash reads each block six times."""

        def __getitem__(self, index: Any) -> Any:
            q, kv = index
            least, most = q.start - kv.stop + 1, q.stop - 1 - kv.start  # of q - kv in the block
            before = least + 1 + most if self.window_size[0] is None else self.window_size[0] + 1
            if most < 0 or least >= before or (least >= 0 and most < before):
                return np.full((1, 1), most >= 0 and least < before)
            return super().__getitem__(index)

    return CausalWindow


class FiniteInputs(NamedTuple):
    """The inputs of the kernels, and which results are contaminated."""

    query: Array  # (B, N, T, H), scaled
    key: Array
    value: Array
    contaminated: Array  # (B, N, T): the query is non-finite, or attends a non-finite key or value


def _make_finite(query: Array, key: Array, value: Array, scale: float | Array, mask: Mask | None) -> FiniteInputs:
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    finite_keys = is_finite(key) & is_finite(value)
    by_keys = _reach(~finite_keys, mask, query.shape[2], backwards=False)
    contaminated = ~is_finite(scaled) | jnp.repeat(by_keys, query.shape[1] // key.shape[1], axis=1)
    return FiniteInputs(
        jnp.where(contaminated[..., None], 0, scaled),
        jnp.where(finite_keys[..., None], key, 0),
        jnp.where(finite_keys[..., None], value, 0),
        contaminated,
    )


def _reach(marked: Array, mask: Mask | None, length: int, *, backwards: bool) -> Array:
    """True for queries that attend a marked key; `backwards` for keys that a marked query attends: (B, K, length)."""
    if mask is None:
        return jnp.broadcast_to(marked.any(-1, keepdims=True), (*marked.shape[:2], length))
    most = max(marked.shape[2], length)
    before = min(int(mask.before), most) if isinstance(mask, SlidingWindow) else most
    reached, width = jnp.pad(marked, ((0, 0), (0, 0), (0, most - marked.shape[2]))), 1
    while width < before:  # steps double: a cumulative maximum takes a TPU's compiler twice as long
        step = min(width, before - width)
        shift = (-step, step, 0) if backwards else (step, -step, 0)
        reached |= lax.pad(reached, False, ((0, 0, 0), (0, 0, 0), shift))
        width += step
    return reached[..., :length]
