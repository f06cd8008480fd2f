"""cuDNN's attention for NVIDIA GPUs, through `jax.nn`, for the plain calls that cuDNN serves.

The forward pass of cuDNN gives out and the log-sum-exp, and the backward pass reads both. JAX's public function is
differentiable as a whole, and rounds the log-sum-exp. The pullback of that function is a pytree with both results as
leaves, not rounded. The forward pass here takes the log-sum-exp from the pullback. The backward pass traces JAX's
function again and puts the known results into the pullback; XLA then drops the traced forward pass as unused.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from attnax.checks import is_concrete
from attnax.kernels._core.platform import has_nvidia_gpu
from attnax.masks import Causal, Mask, SlidingWindow
from attnax.typing import Array, ScoreMod

__all__ = ["Cudnn", "cudnn_backward", "cudnn_forward", "why_not_cudnn_call", "why_not_cudnn_here"]


class Cudnn(NamedTuple):
    """The arguments of cuDNN besides arrays."""

    scale: float
    is_causal: bool
    window: int | None  # how many keys before its own position a query attends; None for all

    @classmethod
    def of(cls, query: Array, mask: Mask | None, scale: Any) -> Cudnn:
        """The arguments for a call that `why_not_cudnn_call` accepts."""
        return cls(
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            mask is not None,
            int(mask.before) - 1 if isinstance(mask, SlidingWindow) else None,
        )


def why_not_cudnn_call(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    dropout_rate: float,
    return_lse: bool,
    scale: Any,
) -> str | None:
    """The reason why cuDNN serves a checked call on no machine, or None.

    Mask and score mod come from `resolve_masks`. `dropout_rate` is 0 if the call is deterministic. With
    `return_lse` the caller gets the log-sum-exp, which then needs a gradient.
    """
    (batch, _, seq_q, head_dim), seq_kv = query.shape, key.shape[2]
    window = mask if isinstance(mask, SlidingWindow) else SlidingWindow(1, 1)
    is_known = is_concrete(window.before) and isinstance(window.after, int) and window.after == 1
    takes_mask = is_known and (mask is None or isinstance(mask, Causal | SlidingWindow))
    takes_head = head_dim % 8 == 0 and head_dim <= 128 and value.shape[3] == head_dim
    takes_lengths = seq_q % 2 == 0 and seq_kv % 2 == 0 and 0 not in (seq_q, seq_kv)
    reasons = {
        "cuDNN takes no score mod": score_mod is not None,
        "cuDNN drops weights by random numbers of its own": dropout_rate > 0.0,
        "cuDNN's log-sum-exp has no gradient": return_lse,
        "cuDNN takes float16 and bfloat16 only": query.dtype not in (jnp.float16, jnp.bfloat16),
        "cuDNN needs a known scale": not is_concrete(scale),
        "cuDNN takes no symbolic batch": not isinstance(batch, int),
        "cuDNN takes head sizes that are multiples of 8, at most 128, and equal for keys and values": not takes_head,
        "cuDNN may leave rows empty, or let NaN through, under masks that are not causal": not takes_mask,
        "cuDNN aligns queries and keys differently under a mask if their lengths differ": mask is not None
        and seq_q != seq_kv,
        "cuDNN takes even lengths, and is known to fail under a mask at 64 beyond a multiple of 128": not takes_lengths
        or (mask is not None and seq_q % 128 == 64),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache  # a machine does not change, and the test takes as long as a trace
def why_not_cudnn_here() -> str | None:
    """The reason why JAX cannot write cuDNN's kernels into programs on this machine, or None.

    JAX reads the version of the cuDNN in its CUDA plugin and, if there is a GPU, its compute capability.
    """
    if has_nvidia_gpu() and float(jax.devices()[0].compute_capability) < 8.0:
        return "cuDNN's attention needs a GPU of compute capability 8.0 or more"
    x = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(cudnn_forward, call=Cudnn(1.0, True, None)), x, x, x)
    except RuntimeError as error:
        words = str(error).rstrip(".")
        plugin = "Its CUDA plugin brings one: jax-cuda13-plugin[with-cuda]"
        return f"JAX {jax.__version__} cannot use cuDNN here: {words}. {plugin}"
    return None


def cudnn_forward(query: Array, key: Array, value: Array, call: Cudnn) -> tuple[Array, Array]:
    """(out in the dtype of query, natural log-sum-exp in float32) of a call that cuDNN serves."""

    def forward(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        out, pull = _attend(call, query, key, value)
        found = [leaf for leaf in jax.tree.leaves(pull) if _is_lse(leaf, query)]
        if len(found) != 1:
            raise NotImplementedError("its pullback does not hold the log-sum-exp")
        return out.swapaxes(1, 2), found[0]

    results: tuple[Array, Array] = _with_rows(forward)(query, key, value)
    return results


def cudnn_backward(
    query: Array, key: Array, value: Array, call: Cudnn, out: Array, lse: Array, d_out: Array
) -> tuple[Array, ...]:
    """The gradients of query, key and value for the cotangent of out, from the results of `cudnn_forward`."""

    def backward(query: Array, key: Array, value: Array, out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
        again, pull = _attend(call, query, key, value)
        leaves, structure = jax.tree.flatten(pull)
        out = out.swapaxes(1, 2)
        leaves = [lse if _is_lse(leaf, query) else out if leaf is again else leaf for leaf in leaves]
        gradients = jax.tree.unflatten(structure, leaves)(d_out.swapaxes(1, 2))
        return tuple(x.swapaxes(1, 2) for x in gradients)

    gradients: tuple[Array, ...] = _with_rows(backward)(query, key, value, out, lse, d_out)
    return gradients


def _with_rows(function: Any) -> Any:
    """The function with a `vmap` that lengthens the batch axis: JAX 0.10 fails unless all arrays are mapped."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: Any, *arrays: Array) -> tuple[Any, Any]:
        every = [x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip(arrays, is_mapped, strict=True)]
        results = mapped(*(x.reshape(-1, *x.shape[2:]) for x in every))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return mapped


def _attend(call: Cudnn, query: Array, key: Array, value: Array) -> tuple[Array, Any]:
    """(out (B, T, N, V), the pullback to query, key and value, all with heads after the sequence)."""

    def attend(query: Array, key: Array, value: Array) -> Array:
        window = None if call.window is None else (call.window, 0)
        options: Any = {"scale": call.scale, "is_causal": call.is_causal, "local_window_size": window}
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)

    return jax.vjp(attend, *(x.swapaxes(1, 2) for x in (query, key, value)))


def _is_lse(leaf: Any, query: Array) -> bool:
    return leaf.dtype == jnp.float32 and leaf.shape == query.shape[:3]
